"""Writes the tables of README, cards and docs from the results in `benchmarks/results/`.

    python benchmarks/tables.py            # rewrite what stands between the markers
    python benchmarks/tables.py --check    # only say whether all of it is fresh

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is a result's file name, or
"methods" for one line per method on Fashion-MNIST.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_masked.training.recipes import read_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
PAGES = ("README.md", "model_cards/*.md", "docs/**/*.md")

MEASURES = {
    "finetune_0.01": "fine-tuned with 1 % of the labels",
    "linear_batchnorm": "linear probe",
    "linear_reference": "linear probe, MAE's settings",
    "knn": "kNN",
}
ROWS = {"pretrained": "pretrained", "untrained": "untrained / from scratch", "raw pixels": "raw pixels"}


def learning_table(result: dict) -> str:
    seeds = list(result["seeds"].values())
    measures = [measure for measure in MEASURES if measure in result["summary"]["pretrained"]]
    titles = " | ".join(MEASURES[measure] for measure in measures)
    lines = [f"| accuracy, % | {titles} |", "|---|" + "---|" * len(measures)]
    for key, title in ROWS.items():
        cells = [_cell(result["summary"][key].get(measure), len(seeds)) for measure in measures]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    minutes = sum(run["pretraining_seconds"] for run in seeds) / len(seeds) / 60
    spread = f"mean (lowest to highest) of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return "\n".join(lines) + (
        f"\n\n{seeds[0]['dataset']}; `{result['recipe']}`{_flags(result)}, {seeds[0]['epochs']:g} epochs in "
        f"{minutes:.0f} minutes on {_cores(result['environment'])}; "
        f"{spread}. Frozen encoders are judged with all labels.\n"
    )


def methods_table() -> str:
    """Of each method measured on Fashion-MNIST: its encoder beside the same network without pretraining."""
    lines = [
        "| accuracy, % | encoder | epochs, minutes | seeds | " + " | ".join(MEASURES.values()) + " |",
        "|---|---|---|---|" + "---|" * len(MEASURES),
    ]
    for path in sorted(RESULTS.glob("learning_*_fashion_mnist.json")):
        result = json.loads(path.read_text())
        seeds, rows = list(result["seeds"].values()), result["summary"]
        settings = read_recipe(ROOT / result["recipe"])
        minutes = sum(run["pretraining_seconds"] for run in seeds) / len(seeds) / 60
        pairs = [_pair(rows["pretrained"].get(measure), rows["untrained"].get(measure)) for measure in MEASURES]
        facts = [settings["method"], settings["model"]["backbone_config"]["model_type"]]
        facts += [f"{seeds[0]['epochs']:g}, {minutes:.0f}", str(len(seeds))]
        lines.append("| " + " | ".join(facts + pairs) + " |")
    return "\n".join(lines) + (
        "\n\nPretrained / untrained (from scratch, where fine-tuned), means over the seeds. The recipes are "
        "`recipes/<method>_fashion_mnist.yaml`; minutes are of one or two busy cores, and the runs are of unequal "
        "cost: this is no ranking.\n"
    )


def _pair(pretrained: dict | None, untrained: dict | None) -> str:
    return f"{100 * pretrained['mean']:.1f} / {100 * untrained['mean']:.1f}" if pretrained else "-"


def _cell(figures: dict | None, seeds: int) -> str:
    if figures is None:
        return "-"
    mean = f"{100 * figures['mean']:.1f}"
    return mean if seeds == 1 else f"{mean} ({100 * figures['lowest']:.1f} to {100 * figures['highest']:.1f})"


def _cores(environment: dict) -> str:
    threads = environment["threads"]
    return f"{threads} core{'s' if threads > 1 else ''} ({environment['device']})"


def _flags(result: dict) -> str:
    return f" with `{' '.join(result['flags'])}`" if result.get("flags") else ""


def step_table(result: dict) -> str:
    lines = ["| size | batch | time, ours / transformers | peak memory, ours / transformers |", "|---|---|---|---|"]
    for size, row in result["sizes"].items():
        lines.append(f"| {size} | {row['batch']} | {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} |")
    facts = result["environment"]
    return "\n".join(lines) + (
        f"\n\n{result['precision']}, {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"transformers {facts['transformers']}; medians of interleaved steps, below 1 is better "
        "(`python benchmarks/step.py`).\n"
    )


def feeding_table(result: dict) -> str:
    lines = ["| | images/s of one core | x transformers | x Pillow + NumPy |", "|---|---|---|---|"]
    for name, row in result["ways"].items():
        lines.append(
            f"| {name} | {row['images_per_second']:.0f} | {row['times_transformers']:.1f} | {row['times_plain']:.1f} |"
        )
    facts = result["environment"]
    return "\n".join(lines) + (
        f"\n\n500 x 375 JPEGs of {result['mean_kilobytes']:.0f} kB to float batches of 224 x 224, {facts['device']}, "
        f"Pillow {facts['pillow']}, torch {facts['torch']}, transformers {facts['transformers']}; ratios are medians "
        f"of {result['rounds']} rounds in turns, above 1 is faster (`python benchmarks/feeding.py`).\n"
    )


def cost_table(result: dict) -> str:
    lines = [
        "| method | encoder | time | peak memory | multiply-adds of forward | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        ratios = " | ".join(f"{row[f'{what}_ratio']:.2f}" for what in ("time", "memory", "multiply_adds"))
        lines.append(f"| {name} | {row['encoder']} | {ratios} | {row['million_parameters']:.1f} M |")
    facts = result["environment"]
    return "\n".join(lines) + (
        f"\n\nRelative to MAE, 224 x 224, batch {result['batch']}, fp32, eager, {facts['device']}, {facts['threads']} "
        f"threads, torch {facts['torch']}; medians of {result['rounds']} interleaved rounds; below 1 is cheaper "
        "(`python benchmarks/cost.py`).\n"
    )


def stereo_table(result: dict) -> str:
    pairs = list(next(iter(result["rows"].values())))
    lines = ["| end-point error in pixels, D1 | " + " | ".join(pairs) + " |", "|---|" + "---|" * len(pairs)]
    for title, row in result["rows"].items():
        cells = [f"{errors['end_point_error']:.2f}, {100 * errors['d1_error']:.1f} %" for errors in row.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    runs = list(result["seeds"].values())
    minutes = sum(run["training_seconds"] for run in runs) / len(runs) / 60
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    return "\n".join(lines) + (
        f"\n\nMiddlebury 2003, quarter size, all pixels of known disparity; `{result['recipe']}`{_flags(result)}, "
        f"{runs[0]['steps']} steps in {minutes:.0f} minutes on {_cores(result['environment'])}; {seeds}; OpenCV "
        f"{result['environment']['opencv']}, holes filled (`python benchmarks/stereo.py`).\n"
    )


def text_table(result: dict) -> str:
    lines = ["| held-out masked tokens | loss, nats | accuracy, % |", "|---|---|---|"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {row['loss']:.2f} | {100 * row['accuracy']:.1f} |")
    runs = list(result["seeds"].values())
    minutes = sum(run["training_seconds"] for run in runs) / len(runs) / 60
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    return "\n".join(lines) + (
        f"\n\n`{result['recipe']}`{_flags(result)}, {runs[0]['epochs']:.3g} epochs in {minutes:.0f} minutes on "
        f"{_cores(result['environment'])}; {seeds} (`python benchmarks/text.py`).\n"
    )


def weight_table(result: dict) -> str:
    """Masks on weights: what a task costs and, as far as it is measured, what it learns beside all weights."""
    tasks = sorted({task for row in result["learning"].values() for task in row})
    lines = [
        "| trained | file of a task, without a head | tensors in memory | "
        + "".join(f"accuracy, {task} | " for task in tasks).rstrip(),
        "|---|---|---|" + "---|" * len(tasks),
    ]
    full = {"file_bytes": result["checkpoint_bytes"], **result["copies"]}
    for way, row in {"the head alone": None, **result["ways"], "all weights": full}.items():
        found = result["learning"].get({"the head alone": "head", "all weights": "all"}.get(way, way), {})
        if row or found:
            cells = [_megabytes(row["file_bytes"]), _megabytes(row["tensor_bytes"])] if row else ["-", "-"]
            cells += [f"{100 * found[task]['accuracy']:.1f} %" if task in found else "-" for task in tasks]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    facts = result["environment"]
    learnt = (
        f" Learning: {result['steps']} steps of {result['batch_size']} sentences of Python's documentation, "
        f"{result['test_sentences']} held out, one seed (`examples/tune_with_masks.py`)."
    )
    return "\n".join([line.rstrip() for line in lines]) + (
        f"\n\n{result['base']}; in memory are {result['tasks']} tasks, on one base or, for all weights, as so many "
        f"models.{learnt if tasks else ''} {facts['device']}, torch {facts['torch']}, transformers "
        f"{facts['transformers']} "
        "(`python benchmarks/weight_masks.py`).\n"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def regularizers_table(result: dict) -> str:
    lines = [
        "| trained with | accuracy, % | with a square hidden | half masked | negative log-likelihood |",
        "|---|---|---|---|---|",
    ]
    rows = {name: list(runs.values()) for name, runs in result["rows"].items()}

    def mean(name: str, figure: str) -> float:
        return sum(run[figure] for run in rows[name]) / len(rows[name])

    for name in rows:
        shares = [f"{100 * mean(name, figure):.1f}" for figure in ("accuracy", "with a square", "half masked")]
        title = "nothing of the kind" if name == "none" else name
        lines.append(f"| {title} | {' | '.join(shares)} | {mean(name, 'nll'):.3f} |")
    seeds = f"means of {len(rows['none'])} seeds" if len(rows["none"]) > 1 else "one seed"
    return "\n".join(lines) + (
        f"\n\nA small ResNet from scratch, {result['labels']:,} labelled pictures of Fashion-MNIST, {result['steps']} "
        f"steps of {result['batch_size']}, crops and flips; 10,000 test pictures; {seeds}; "
        f"{_cores(result['environment'])} (`python benchmarks/regularizers.py`).\n"
    )


def graphs_table(result: dict) -> str:
    lines = ["| | Cora | Citeseer | the papers' |", "|---|---|---|---|"]
    for title, row in result["rows"].items():
        cells = [_seeds_cell(row["graphs"].get(graph)) for graph in ("cora", "citeseer")]
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {row['paper']} |")
    return "\n".join(lines) + (
        f"\n\nPer cent; mean (lowest to highest), number of seeds. {result['protocol']} Recipes: "
        f"{', '.join(f'`{name}`' for name in result['recipes'])}; {_cores(result['environment'])}, torch-geometric "
        f"{result['environment']['torch_geometric']} (`python benchmarks/graphs.py`).\n"
    )


def _seeds_cell(figures: dict | None) -> str:
    if figures is None:
        return "-"
    values = [100 * value for value in figures["seeds"].values()]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f}), {len(values)}"


def points_table(result: dict) -> str:
    titles = {"knn": "kNN", "linear": "linear probe", "linear_10_per_class": "linear probe, 10 labels per class"}
    lines = ["| accuracy, % | " + " | ".join(titles.values()) + " |", "|---|" + "---|" * len(titles)]
    for title, row in result["rows"].items():
        lines.append(f"| {title} | " + " | ".join(f"{100 * row[measure]:.1f}" for measure in titles) + " |")
    return "\n".join(lines) + (
        f"\n\nFrozen encoders on {result['dataset']}; `{result['recipe']}`{_flags(result)}, {result['steps']} steps "
        f"in {result['pretraining_seconds'] / 60:.1f} minutes on {_cores(result['environment'])}; one seed "
        "(`python benchmarks/points.py`).\n"
    )


KINDS = {
    "regularizers": regularizers_table,
    "cost": cost_table,
    "graphs": graphs_table,
    "learning": learning_table,
    "step": step_table,
    "feeding": feeding_table,
    "stereo": stereo_table,
    "text": text_table,
    "points": points_table,
    "weight": weight_table,
}


def table(name: str) -> str:
    """The table of a result, with a final newline.

    Raises:
        SystemExit: if there is no such result.
    """
    if name == "methods":
        return methods_table()
    path = RESULTS / f"{name}.json"
    if not path.exists():
        sys.exit(f"There is no {path}: run the benchmark that writes it.")
    result = json.loads(path.read_text())
    return KINDS[name.partition("_")[0]](result)


def filled(page: str) -> str:
    """A page with all its tables made anew."""
    return MARKED.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def pages() -> list[Path]:
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [path for path in pages() if filled(path.read_text()) != path.read_text()]
    if args.check and stale:
        sys.exit(f"Stale tables in {', '.join(str(path.relative_to(ROOT)) for path in stale)}.")
    for path in stale:
        path.write_text(filled(path.read_text()))
        print("wrote", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
