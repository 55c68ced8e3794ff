"""One-shot classification of Omniglot's characters by Lake's protocol: joint networks and the triplet network.

    python benchmarks/omniglot.py --data ../shared/data --seeds 0 1 2

Each method learns from the five alphabets of the background set "small 1" (`omniglot_small1`) and then answers the
400 questions of `omniglot_one_shot/all_runs.zip`: in each of 20 runs, 20 characters that one person drew are to be
found among those that another drew, of an alphabet that was not there in training (B. Lake et al., Science 2015).
"pixels" takes the nearest picture of the same size. Each finished seed is written at once; what is written is not run
again. Further flags go to the training program.
"""

import argparse
import json
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, environment, write_result
from hf_masked import JNNForPairClassification, TripletModel
from hf_masked.evaluation.one_shot import one_shot_accuracy
from hf_masked.training.cli import train
from hf_masked.training.recipes import parse

ROOT = Path(__file__).parents[1]
RUNS = 20

# Row -> recipe, flags.
METHODS = {
    "jnn_recognition": ("jnn_recognition_omniglot", []),
    "jnn_recognition, late fusion": ("jnn_recognition_omniglot", ["--model.joint_stages", "[]"]),
    "triplet": ("triplet_omniglot", []),
}

# Of a query (questions, channels, height, width) and a support set (ways, ...): scores (questions, ways).
Scorer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lake_runs(archive: str | Path) -> Iterator[tuple[list[Image.Image], list[Image.Image], torch.Tensor]]:
    """The 20 runs: 20 pictures to classify, one picture of each of 20 classes, and the right class of each of the
    former, int64 (20,)."""
    with zipfile.ZipFile(archive) as files:

        def picture(name: str) -> Image.Image:
            with files.open(name) as file:
                return Image.open(file).convert("L")

        for run in range(1, RUNS + 1):
            lines = files.read(f"run{run:02d}/class_labels.txt").decode().split("\n")
            questions, answers = zip(*(line.split() for line in lines if line.strip()), strict=True)
            support = sorted(set(answers))
            right = torch.tensor([support.index(answer) for answer in answers])
            yield [picture(name) for name in questions], [picture(name) for name in support], right


def judged(scorer: Scorer, processor, archive: Path) -> dict[str, float]:
    """Accuracy over all runs, and the error of each."""
    scores, references, errors = [], [], []
    for questions, support, right in lake_runs(archive):
        queries, pictures = (processor(images)["pixel_values"] for images in (questions, support))
        with torch.no_grad():
            scores.append(scorer(queries, pictures))
        references.append(right)
        errors.append(1 - one_shot_accuracy(scores[-1], right)["accuracy"])
    return one_shot_accuracy(torch.cat(scores), torch.cat(references)) | {"errors_of_runs": errors}


def nearest(queries: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    return -torch.cdist(queries.flatten(1), support.flatten(1))


def scorer_of(folder: str, method: str) -> Scorer:
    """How a saved model scores."""
    if method == "triplet":
        triplet = TripletModel.from_pretrained(folder).eval()
        return lambda queries, support: nearest(triplet(queries).embedding, triplet(support).embedding)
    joint = JNNForPairClassification.from_pretrained(folder).eval()
    return lambda queries, support: joint.predict_same(queries, support.expand(len(queries), *support.shape))


def run_seed(seed: int, data: Path, output: str, flags: list[str]) -> dict[str, dict]:
    archive, rows = data / "omniglot_one_shot" / "all_runs.zip", {}
    for row, (recipe, own) in METHODS.items():
        folder = f"{output}/{row.replace(', ', '_').replace(' ', '_')}"
        recipe_flags = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *own]
        run_flags = ["--dataset_name", str(data / "omniglot_small1"), "--seed", str(seed), "--output_dir", folder]
        method, arguments, args = parse([*recipe_flags, *run_flags, *flags])
        started = time.perf_counter()
        trainer = train(method, arguments, args)
        seconds = time.perf_counter() - started
        figures = judged(scorer_of(folder, method.method), trainer.processing_class, archive)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        rows[row] = figures | {"steps": trainer.state.global_step, "seconds": seconds, "parameters": parameters}
    rows["pixels"] = judged(nearest, trainer.processing_class, archive)
    return rows


def summary(seeds: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Per row the mean error and its range over the seeds."""
    rows = {}
    for row in next(iter(seeds.values())):
        errors = [1 - seed[row]["accuracy"] for seed in seeds.values()]
        rows[row] = {"mean": statistics.mean(errors), "lowest": min(errors), "highest": max(errors)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="omniglot", help="of the result")
    args, flags = parser.parse_known_args()
    path = RESULTS / f"{args.name}.json"
    result = json.loads(path.read_text()) if path.exists() else {"flags": flags, "seeds": {}}
    for seed in args.seeds:
        if str(seed) in result["seeds"]:
            continue
        result["seeds"][str(seed)] = run_seed(seed, args.data, f"runs/{args.name}/seed-{seed}", flags)
        result |= {"environment": environment(torch.device("cpu")), "summary": summary(result["seeds"])}
        write_result(args.name, result)
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    main()
