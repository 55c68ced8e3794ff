"""Stereo matching on two real pairs, learnt from made ones, beside OpenCV's semi-global matching.

    python benchmarks/stereo.py                                     # writes benchmarks/results/stereo_middlebury.json
    python benchmarks/stereo.py --seeds 0 1 2 --max_steps 3000

Trains `recipes/psmnet_synthetic.yaml` on synthetic pairs and judges it on Middlebury's cones and teddy (2003, quarter
size; `../shared/data/stereo`, or --data), which nothing is trained or chosen on. The rows beside it: OpenCV's
semi-global matching (pip install opencv-python-headless) in its full-search form, holes filled from the left, and the
constant disparity that suits each pair best, which looks at the truth. Pixels without a known disparity are left out;
occluded ones count. Further flags go to the training program.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, write_result
from hf_masked.evaluation.stereo import StereoMatcher, stereo_errors, valid_pixels
from hf_masked.processing.stereo import read_disparity
from hf_masked.training.cli import train
from hf_masked.training.recipes import parse
from hf_masked.training.visualization import disparity_picture

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/psmnet_synthetic.yaml"
PAIRS = ("cones", "teddy")
# Middlebury's files hold quarters of pixels.
SCALE = 4.0


def read_pairs(folder: Path) -> dict[str, tuple[Image.Image, Image.Image, torch.Tensor]]:
    """Name -> left picture, right picture, disparity of the left one."""
    if not folder.is_dir():
        sys.exit(f"There is no folder {folder} with {PAIRS[0]}_left.png and the others: name it with --data.")
    return {
        name: (
            Image.open(folder / f"{name}_left.png").convert("RGB"),
            Image.open(folder / f"{name}_right.png").convert("RGB"),
            read_disparity(folder / f"{name}_disparity_x4.png", SCALE),
        )
        for name in PAIRS
    }


def semi_global_matching(left: Image.Image, right: Image.Image, max_disparity: int) -> torch.Tensor:
    """OpenCV's, with its documentation's penalties for blocks of 5; each hole takes the next value on its left, or on
    its right at the border."""
    import cv2

    block = 5
    matcher = cv2.StereoSGBM_create(
        minDisparity=0,
        numDisparities=max_disparity,
        blockSize=block,
        P1=8 * 3 * block**2,
        P2=32 * 3 * block**2,
        disp12MaxDiff=1,
        uniquenessRatio=10,
        speckleWindowSize=100,
        speckleRange=2,
        mode=cv2.STEREO_SGBM_MODE_HH,
    )
    # Columns that have no partner within the range get no value: more picture on the left gives them one.
    views = [
        cv2.copyMakeBorder(np.asarray(view), 0, 0, max_disparity, 0, cv2.BORDER_REPLICATE) for view in (left, right)
    ]
    found = torch.from_numpy(matcher.compute(*views)[:, max_disparity:].astype(np.float32) / 16)
    return filled_from_the_left(found, found > 0)


def filled_from_the_left(disparity: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """(height, width) with each unknown value replaced by the nearest known one on its left, else on its right."""
    columns = torch.arange(disparity.shape[1]).expand_as(disparity)
    before = torch.where(known, columns, -1).cummax(dim=1).values
    after = torch.where(known, columns, disparity.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    nearest = torch.where(before >= 0, before, after.clamp(max=disparity.shape[1] - 1))
    return disparity.gather(1, nearest)


def best_constant(truth: torch.Tensor) -> torch.Tensor:
    """The median, which no constant beats in end-point error."""
    return torch.full_like(truth, truth[valid_pixels(truth)].median().item())


def learn(seed: int, flags: list[str], output: Path):
    """The matcher of a training run, its steps and its seconds."""
    arguments = ["--config", str(ROOT / RECIPE), "--seed", str(seed), "--output_dir", str(output), *flags]
    method, data, args = parse(arguments)
    started = time.perf_counter()
    trainer = train(method, data, args)
    seconds = time.perf_counter() - started
    return StereoMatcher(trainer.model, trainer.processing_class), trainer.state.global_step, seconds


def judged(maps: dict[str, torch.Tensor], pairs: dict) -> dict[str, dict[str, float]]:
    """Pair -> errors."""
    return {name: stereo_errors(maps[name], truth) for name, (_, _, truth) in pairs.items()}


def mean_rows(rows: list[dict]) -> dict:
    """Pair -> error -> mean over the seeds."""
    return {
        pair: {error: statistics.mean(row[pair][error] for row in rows) for error in rows[0][pair]} for pair in rows[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "stereo")
    parser.add_argument("--name", default="stereo_middlebury", help="of the result")
    parser.add_argument("--output", type=Path, default=Path("runs/stereo"), help="folder of runs and pictures")
    args, flags = parser.parse_known_args()
    pairs = read_pairs(args.data)
    runs, learnt = {}, []
    for seed in args.seeds:
        matcher, steps, seconds = learn(seed, flags, args.output / f"seed-{seed}")
        maps = {name: matcher(left, right).disparity for name, (left, right, _) in pairs.items()}
        learnt.append(judged(maps, pairs))
        runs[seed] = {"steps": steps, "training_seconds": seconds, "errors": learnt[-1]}
    largest = matcher.model.config.max_disparity
    baseline = {name: semi_global_matching(left, right, largest) for name, (left, right, _) in pairs.items()}
    rows = {
        "PSMNet, synthetic pairs": mean_rows(learnt),
        "semi-global matching": judged(baseline, pairs),
        "best constant": judged({name: best_constant(truth) for name, (_, _, truth) in pairs.items()}, pairs),
    }
    for name, (_, _, truth) in pairs.items():
        found = {"psmnet": maps[name], "sgm": baseline[name], "truth": truth}
        for kind, disparity in found.items():
            disparity_picture(disparity, largest=truth.max().item()).save(args.output / f"{name}_{kind}.png")
    facts = environment(torch.device("cpu")) | {"opencv": _opencv_version()}
    result = {"recipe": RECIPE, "flags": flags, "seeds": runs, "rows": rows, "environment": facts}
    print(f"wrote {write_result(args.name, result)}")
    for title, row in rows.items():
        cells = [f"{pair} " + "  ".join(f"{k} {v:.3f}" for k, v in errors.items()) for pair, errors in row.items()]
        print(f"{title:26}" + "   ".join(cells))


def _opencv_version() -> str:
    import cv2

    return cv2.__version__


if __name__ == "__main__":
    main()
