"""What a pretraining step of each method costs, relative to MAE's with the same encoder.

    python benchmarks/cost.py                          # all methods, writes benchmarks/results/cost_<device>.json
    python benchmarks/cost.py --methods crossmae hpm   # MAE and these

Each method of the catalogue runs as its paper's recipe (`recipes/`) has it, with ViT-S/16 as its encoder where the
recipe has ViT-B/16; others keep theirs, and teachers are untrained ones of the recipe's form. A step is forward,
backward, AdamW and the averaging of momentum twins, on pictures whose masks and views are drawn beforehand, half-way
through training. Each method takes turns with MAE in one process; memory is the growth of a fresh process. Each
finished row is written at once; what is written is not run again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import hf_masked
from benchmarks.common import (
    RESULTS,
    environment,
    in_fresh_process,
    interleaved_seconds,
    median_ratio,
    peak_memory_mib,
    reset_peak_memory,
    write_result,
)
from hf_masked.modeling.registry import CATALOGUE, get_variant
from hf_masked.training.recipes import read_recipe
from hf_masked.training.throughput import forward_flops

ROOT = Path(__file__).parents[1]
VIT_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
BASELINE = "mae"


def paper_recipes() -> dict[str, Path]:
    """Of each method the recipe of the paper's size: with a ViT-B where there is one. Those for laptops are on
    Fashion-MNIST."""
    recipes: dict[str, Path] = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        settings = read_recipe(path)
        if settings["dataset_name"] != "fashion_mnist":
            name = settings["method"]
            if name not in recipes or path.stem.endswith("_vit_base"):
                recipes[name] = path
    return recipes


def shrunk(settings: dict) -> dict:
    """The `model` block of a recipe with ViT-S/16 in place of ViT-B/16."""
    backbone = dict(settings.get("backbone_config", {}))
    if backbone.get("hidden_size") == 768 and "depths" not in backbone:
        backbone |= VIT_SMALL
    return settings | {"backbone_config": backbone}


def build(name: str, recipe: Path, batch: int, device: torch.device):
    """The model in training mode, half-way through its training, and a batch of its inputs."""
    variant = get_variant(name)
    config = variant.config(**shrunk(read_recipe(recipe).get("model", {})))
    for part in ("teacher", "tokenizer"):
        if getattr(config, f"{part}_config", None) is not None:
            setattr(config, part, None)  # an untrained one of that form, which costs the same
    torch.manual_seed(0)
    model = variant.pretraining(config).to(device).train()
    model.training_progress = 0.5
    processor = getattr(hf_masked, config.processor)(**config.processor_settings())
    size = tuple(processor.size.values())
    pictures = torch.randint(256, (batch, config.num_channels, *size), dtype=torch.uint8)
    indices = torch.arange(batch)
    pixels = processor.prepare_training(pictures, indices, 0, 0)
    inputs = processor.finish_training(pixels.to(device), indices, 0, 0)
    return model, {key: value.to(device) for key, value in inputs.items()}


def make_step(model, inputs: dict):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_twins()

    return step


def memory_of(name: str, recipe: str, batch: int) -> None:
    """Prints the growth of the process's memory over three steps, model included."""
    before = reset_peak_memory()
    step = make_step(*build(name, Path(recipe), batch, torch.device("cpu")))
    for _ in range(3):
        step()
    print(json.dumps({"mib": peak_memory_mib() - before}))


def memory_on_gpu(name: str, recipe: Path, batch: int, device: torch.device) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = make_step(*build(name, recipe, batch, device))
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def compare(name: str, recipes: dict[str, Path], batch: int, rounds: int, device: torch.device) -> dict:
    """The row of a method: its own figures, and its time over MAE's in the same rounds."""
    model, inputs = build(name, recipes[name], batch, device)
    row = {
        "recipe": str(recipes[name].relative_to(ROOT)),
        "encoder": describe(model.config.backbone_config),
        "million_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
        "giga_multiply_adds": forward_flops(model, inputs) / 2e9 / batch,
    }
    steps = {name: make_step(model, inputs), "beside": make_step(*build(BASELINE, recipes[BASELINE], batch, device))}
    seconds = interleaved_seconds(steps, rounds, device)
    row |= {"median_seconds": statistics.median(seconds[name])}
    row |= {"time_ratio": median_ratio(seconds[name], seconds["beside"])}
    del model, inputs, steps
    row["peak_memory_mib"] = (
        memory_on_gpu(name, recipes[name], batch, device)
        if device.type == "cuda"
        else in_fresh_process(__file__, "--memory", name, str(recipes[name]), str(batch))["mib"]
    )
    return row


def describe(config) -> str:
    sizes = [getattr(config, name) for name in ("hidden_size", "num_hidden_layers") if hasattr(config, name)]
    return " ".join(map(str, [config.model_type, *sizes]))


def main() -> None:
    recipes = paper_recipes()
    # A pair of pictures with its cost volume is no unit to compare a masked picture with.
    methods = [
        v.name
        for v in CATALOGUE.values()
        if v.kind == "model" and v.config.modality == "image" and v.config.sample != "stereo"
    ]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=3, metavar=("METHOD", "RECIPE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory_of(args.memory[0], args.memory[1], int(args.memory[2]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = RESULTS / f"cost_{device.type}.json"
    result = {"batch": args.batch, "rounds": args.rounds, "methods": {}}
    if path.exists():
        result = json.loads(path.read_text())
        if (result["batch"], result["rounds"]) != (args.batch, args.rounds):
            sys.exit(f"{path} holds rows of batch {result['batch']}, {result['rounds']} rounds: remove it first.")
    rows = result["methods"]
    print(f"{'method':18}{'encoder':18}{'time':>7}{'memory':>8}{'multiply-adds':>15}   (relative to MAE)")
    for name in dict.fromkeys([BASELINE, *args.methods]):
        if name not in rows:
            row = rows[name] = compare(name, recipes, args.batch, args.rounds, device)
            row["multiply_adds_ratio"] = row["giga_multiply_adds"] / rows[BASELINE]["giga_multiply_adds"]
            row["memory_ratio"] = row["peak_memory_mib"] / rows[BASELINE]["peak_memory_mib"]
            write_result(path.stem, result | {"environment": environment(device)})
        row = rows[name]
        figures = f"{row['time_ratio']:>7.2f}{row['memory_ratio']:>8.2f}{row['multiply_adds_ratio']:>15.2f}"
        print(f"{name:18}{row['encoder']:18}{figures}", flush=True)


if __name__ == "__main__":
    main()
