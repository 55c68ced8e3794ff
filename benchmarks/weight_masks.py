"""What masks on weights cost on disk and in memory, against full copies of the model; writes JSON.

    python benchmarks/weight_masks.py [--tasks 8]
    python benchmarks/weight_masks.py --learn head all masking_lm ... [--steps 300]

Of each tuner: the bytes of one task's file beside the full checkpoint; the bytes of tensors of one base with k tasks
beside k full models; and how far the resident memory of a fresh process grows, which also holds what libraries keep.
The masks are those at the start: their size does not depend on their values. With `--learn` the named ways of
`examples/tune_with_masks.py` learn its tasks, and their accuracies go into the same file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.common import (
    RESULTS,
    environment,
    in_fresh_process,
    peak_memory_mib,
    reset_peak_memory,
    write_result,
)
from examples.tune_with_masks import TASKS, WAYS, learn, packaged_encoder, sentences, split
from hf_masked import FishMaskConfig, MaskingLMConfig, MaskLLMConfig, harden_masks, initialize_fish_mask

CONFIGS = {
    "fish_mask": FishMaskConfig(keep_ratio=0.005, num_samples=16),
    "masking_lm": MaskingLMConfig(),
    "maskllm": MaskLLMConfig(),
}


def new_adapter(base: str, way: str, folder: Path) -> int:
    """Saves an untrained adapter; returns the bytes of its tensors' file."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), CONFIGS[way])
    if way == "fish_mask":
        texts = ["a mask on weights", "of a frozen model"]
        batch = AutoTokenizer.from_pretrained(base)(texts, return_tensors="pt", padding=True)
        initialize_fish_mask(model, [{**batch, "labels": torch.tensor([0, 1])}])
    else:
        harden_masks(model)
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").stat().st_size


def served(base: str, folder: str, tasks: int) -> dict:
    """Memory of k tasks: from one base if there is a folder with an adapter, else as k models."""
    before = reset_peak_memory()
    if folder == "copies":
        models = [AutoModelForSequenceClassification.from_pretrained(base) for _ in range(tasks)]
    else:
        model = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base), folder, adapter_name="task0"
        )
        for task in range(1, tasks):
            model.load_adapter(folder, adapter_name=f"task{task}")
        models = [model]
    # What is mapped from files counts once it is read.
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        for model in models:
            model.eval()(input_ids=ids)
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return {"tensor_bytes": sum(unique.values()), "peak_mib": round(peak_memory_mib() - before, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--base")
    parser.add_argument("--learn", nargs="+", choices=WAYS, default=[])
    parser.add_argument("--on", nargs="+", choices=TASKS, default=list(TASKS), help="Tasks to learn.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", nargs=2, metavar=("FOLDER", "TASKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = arguments.base or packaged_encoder()
    if arguments.memory:
        print(json.dumps(served(base, arguments.memory[0], int(arguments.memory[1]))))
        return
    path = RESULTS / "weight_masks.json"
    result = json.loads(path.read_text()) if path.exists() else {"learning": {}}
    result["base"] = arguments.base or "all-MiniLM-L6-v2"
    if arguments.learn:
        learn_tasks(base, arguments, result)
    else:
        measure(base, arguments.tasks, result)
    result["environment"] = environment(torch.device("cpu"))
    print(f"Wrote {write_result('weight_masks', result)}.")


def learn_tasks(base: str, arguments, result: dict) -> None:
    tokenizer, texts = AutoTokenizer.from_pretrained(base), sentences(None)
    result |= {"steps": arguments.steps, "batch_size": arguments.batch_size, "test_sentences": len(split(texts)[1])}
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = Path(folder)
        for way in arguments.learn:
            for task in arguments.on:
                line = learn(way, task, base, tokenizer, texts, arguments)
                result["learning"].setdefault(way, {})[task] = line
                print(json.dumps(line), flush=True)
                write_result("weight_masks", result)


def measure(base: str, tasks: int, result: dict) -> None:
    result |= {"tasks": tasks, "ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        full = AutoModelForSequenceClassification.from_pretrained(base)
        full.save_pretrained(Path(folder) / "full")
        result["checkpoint_bytes"] = (Path(folder) / "full" / "model.safetensors").stat().st_size
        result["copies"] = in_fresh_process(__file__, "--base", base, "--memory", "copies", str(tasks))
        for way in CONFIGS:
            size = new_adapter(base, way, Path(folder) / way)
            memory = in_fresh_process(__file__, "--base", base, "--memory", str(Path(folder) / way), str(tasks))
            result["ways"][way] = {"file_bytes": size, **memory}
    full, copies = result["checkpoint_bytes"], result["copies"]
    for way, row in result["ways"].items():
        print(
            f"{way:<12}{row['file_bytes']:>12,} bytes a task, 1/{full / row['file_bytes']:.0f} of {full:,}; "
            f"{tasks} tasks in {row['tensor_bytes'] / 2**20:.0f} MiB of tensors against "
            f"{copies['tensor_bytes'] / 2**20:.0f}, process {row['peak_mib']:.0f} MiB against {copies['peak_mib']:.0f}"
        )


if __name__ == "__main__":
    main()
