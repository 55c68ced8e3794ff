"""Graphs of citations: SGC's accuracy, Bandana's held-out links and its features of nodes, with the papers' recipes.

    python benchmarks/graphs.py --data ../shared/data/graphs --seeds 0 1 2
    python benchmarks/graphs.py --only bandana_cora

`--data` holds cora.npz and citeseer.npz with the public splits. A seed is that of weights, dropout, bandwidths and
pairs; the edges held out are the same for all. Each finished seed is written at once and is not run again, and an
interrupted one goes on from its last checkpoint. Further flags go to the training program.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, environment, write_result
from hf_masked.data.graphs import labelled_nodes, load_graph
from hf_masked.evaluation.graphs import node_probe
from hf_masked.training.cli import train
from hf_masked.training.recipes import parse

ROOT = Path(__file__).parents[1]
NAME = "graphs_cpu"
PROBE_SEEDS = 10

# Row of the table -> what the papers give.
ROWS = {
    "SGC, accuracy": "81.0, 71.9",
    "Bandana, AUC of links": "95.71, 96.89",
    "Bandana, average precision of links": "95.25, 97.16",
    "Bandana, accuracy of a linear probe": "84.62, 73.60",
}
# Recipe -> graph.
RECIPES = {
    "sgc_cora": "cora",
    "sgc_citeseer": "citeseer",
    "bandana_cora": "cora",
    "bandana_cora_nodes": "cora",
}
PROTOCOL = (
    "SGC: the last epoch, public split. Links: 10 % of the edges held out for testing, at the epoch that is best on "
    "5 % held out for validation. Probe: public split, features of the last epoch, mean of ten probes at the epoch of "
    "their best validation."
)


def trained(recipe: str, seed: int, data: Path, flags: list[str]):
    """The trainer after the recipe's run."""
    path = ROOT / "recipes" / f"{recipe}.yaml"
    run = ["--dataset_name", str(data / f"{RECIPES[recipe]}.npz"), "--seed", str(seed), "--save_steps", "100"]
    output = ["--output_dir", f"runs/{NAME}/{recipe}-{seed}", "--disable_tqdm", "true", "--save_strategy", "steps"]
    return train(*parse(["--config", str(path), *run, *output, *flags]))


def sgc_figures(trainer, graph) -> dict[str, float]:
    return {"SGC, accuracy": _logged(trainer, "test_accuracy")[-1]["test_accuracy"]}


def link_figures(trainer, graph) -> dict[str, float]:
    best = max(_logged(trainer, "test_link_auc"), key=lambda line: line["validation_link_auc"])
    return {
        "Bandana, AUC of links": best["test_link_auc"],
        "Bandana, average precision of links": best["test_link_ap"],
    }


@torch.no_grad()
def node_figures(trainer, graph) -> dict[str, float]:
    features = trainer.model.eval().node_features(**trainer.processing_class.prepare(graph))
    chosen = {part: labelled_nodes(graph, part) for part in ("train", "validation", "test")}
    rows = {part: features[nodes] for part, (nodes, _) in chosen.items()}
    labels = {part: classes for part, (_, classes) in chosen.items()}
    with torch.enable_grad():
        probes = [node_probe(rows, labels, seed=seed)["test_accuracy"] for seed in range(PROBE_SEEDS)]
    return {"Bandana, accuracy of a linear probe": sum(probes) / len(probes)}


FIGURES = {
    "sgc_cora": sgc_figures,
    "sgc_citeseer": sgc_figures,
    "bandana_cora": link_figures,
    "bandana_cora_nodes": node_figures,
}


def _logged(trainer, name: str) -> list[dict]:
    return [line for line in trainer.state.log_history if name in line]


def add(result: dict, recipe: str, seed: int, figures: dict[str, float], steps: int) -> None:
    for row, value in figures.items():
        graphs = result["rows"].setdefault(row, {"paper": ROWS[row], "graphs": {}})["graphs"]
        graphs.setdefault(RECIPES[recipe], {"recipe": recipe, "steps": steps, "seeds": {}})["seeds"][str(seed)] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "graphs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="recipes to run")
    args, flags = parser.parse_known_args()
    path = RESULTS / f"{NAME}.json"
    result = json.loads(path.read_text()) if path.exists() else {"flags": flags, "done": [], "rows": {}}
    for recipe in args.only:
        for seed in args.seeds:
            if [recipe, seed] in result["done"]:
                continue
            trainer = trained(recipe, seed, args.data, flags)
            figures = FIGURES[recipe](trainer, load_graph(str(args.data / f"{RECIPES[recipe]}.npz")))
            add(result, recipe, seed, figures, trainer.state.global_step)
            result["done"].append([recipe, seed])
            result["rows"] = {row: result["rows"][row] for row in ROWS if row in result["rows"]}
            result |= {
                "recipes": sorted({f"recipes/{name}.yaml" for name, _ in result["done"]}),
                "protocol": PROTOCOL,
                "environment": environment(torch.device("cpu")) | {"torch_geometric": version("torch-geometric")},
            }
            write_result(NAME, result)
            print(recipe, seed, figures)


if __name__ == "__main__":
    main()
