"""What masks on weights cost on disk and in memory, against full copies of the model; writes JSON.

    python benchmarks/weight_masks.py [--tasks 8] [--base FOLDER]

Of each tuner: the bytes of one task's file beside the full checkpoint; the bytes of tensors of one base with k tasks
beside k full models; and how far the resident memory of a fresh process grows, which also holds what libraries keep.
The masks are those at the start: their size does not depend on their values.
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

from benchmarks.common import environment, in_fresh_process, peak_memory_mib, reset_peak_memory, write_result
from examples.tune_with_masks import packaged_encoder
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
    parser.add_argument("--memory", nargs=2, metavar=("FOLDER", "TASKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = arguments.base or packaged_encoder()
    if arguments.memory:
        print(json.dumps(served(base, arguments.memory[0], int(arguments.memory[1]))))
        return
    result = {"base": Path(base).parent.name if arguments.base is None else base, "tasks": arguments.tasks, "ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        full = AutoModelForSequenceClassification.from_pretrained(base)
        full.save_pretrained(Path(folder) / "full")
        result["checkpoint_bytes"] = (Path(folder) / "full" / "model.safetensors").stat().st_size
        result["copies"] = in_fresh_process(__file__, "--base", base, "--memory", "copies", str(arguments.tasks))
        for way in CONFIGS:
            size = new_adapter(base, way, Path(folder) / way)
            memory = in_fresh_process(
                __file__, "--base", base, "--memory", str(Path(folder) / way), str(arguments.tasks)
            )
            result["ways"][way] = {"file_bytes": size, **memory}
    result["environment"] = environment(torch.device("cpu"))
    full, copies = result["checkpoint_bytes"], result["copies"]
    for way, row in result["ways"].items():
        print(
            f"{way:<12}{row['file_bytes']:>12,} bytes a task, 1/{full / row['file_bytes']:.0f} of {full:,}; "
            f"{arguments.tasks} tasks in {row['tensor_bytes'] / 2**20:.0f} MiB of tensors against "
            f"{copies['tensor_bytes'] / 2**20:.0f}, process {row['peak_mib']:.0f} MiB against {copies['peak_mib']:.0f}"
        )
    print(f"Wrote {write_result('weight_masks', result)}.")


if __name__ == "__main__":
    main()
