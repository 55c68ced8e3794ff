"""One pretraining step (forward, backward, AdamW) of our MAE beside transformers' `ViTMAEForPreTraining`.

    python benchmarks/step.py                 # all sizes, writes benchmarks/results/step_<device>.json
    python benchmarks/step.py --sizes tiny --rounds 20

Both classes get the same sizes, the same random pictures and the same optimizer, and take turns in one process; the
figures to quote are the ratios. transformers' class trains with zero positions from scratch, which costs the same.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import (
    environment,
    in_fresh_process,
    interleaved_seconds,
    median_ratio,
    peak_memory_mib,
    reset_peak_memory,
    write_result,
)
from hf_masked import MAEConfig, MAEForPreTraining

# name: (width, depth, heads, picture, patch, decoder width, decoder depth, decoder heads, batch, rounds)
SIZES = {
    "tiny 32px": (192, 6, 3, 32, 4, 96, 2, 3, 64, 15),
    "ViT-S/16 224px": (384, 12, 6, 224, 16, 512, 8, 16, 8, 9),
    "ViT-B/16 224px": (768, 12, 12, 224, 16, 512, 8, 16, 4, 5),
}


def build(which: str, size: str) -> torch.nn.Module:
    width, depth, heads, picture, patch, decoder_width, decoder_depth, decoder_heads, *_ = SIZES[size]
    encoder = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": picture,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    decoder = {
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": decoder_depth,
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": 4 * decoder_width,
        "norm_pix_loss": True,
    }
    torch.manual_seed(0)
    if which == "ours":
        return MAEForPreTraining(MAEConfig(backbone_config=ViTConfig(**encoder), **decoder)).train()
    return ViTMAEForPreTraining(ViTMAEConfig(**encoder, **decoder)).train()


def make_step(model: torch.nn.Module, size: str, device: torch.device):
    picture, batch = SIZES[size][3], SIZES[size][8]
    model.to(device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    pixel_values = torch.randn(batch, 3, picture, picture, device=device)

    def step() -> None:
        model(pixel_values).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory_of(which: str, size: str) -> None:
    """Prints the growth of the process's memory over three steps, model included."""
    before = reset_peak_memory()
    step = make_step(build(which, size), size, torch.device("cpu"))
    for _ in range(3):
        step()
    print(json.dumps({"mib": peak_memory_mib() - before}))


def memory_on_gpu(which: str, size: str, device: torch.device) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = make_step(build(which, size), size, device)
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def compare(size: str, device: torch.device, rounds: int | None) -> dict:
    steps = {which: make_step(build(which, size), size, device) for which in ("ours", "transformers")}
    seconds = interleaved_seconds(steps, rounds or SIZES[size][9], device)
    del steps
    memory = {
        which: memory_on_gpu(which, size, device)
        if device.type == "cuda"
        else in_fresh_process(__file__, "--memory", which, size)["mib"]
        for which in ("ours", "transformers")
    }
    return {
        "batch": SIZES[size][8],
        "rounds": len(seconds["ours"]),
        "median_seconds": {which: statistics.median(times) for which, times in seconds.items()},
        "time_ratio": median_ratio(seconds["ours"], seconds["transformers"]),
        "peak_memory_mib": memory,
        "memory_ratio": memory["ours"] / memory["transformers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--no_write", action="store_true")
    parser.add_argument("--memory", nargs=2, metavar=("WHICH", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory_of(*args.memory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"environment": environment(device), "precision": "fp32, eager", "sizes": {}}
    print(f"{'size':18}{'time ratio':>12}{'memory ratio':>14}   (ours / transformers; below 1 is better)")
    for size in args.sizes:
        row = result["sizes"][size] = compare(size, device, args.rounds)
        print(f"{size:18}{row['time_ratio']:>12.3f}{row['memory_ratio']:>14.3f}", flush=True)
    if not args.no_write:
        print("wrote", write_result(f"step_{device.type}", result))


if __name__ == "__main__":
    main()
