"""`make demo`: pretrains a small MAE on real pictures and shows what it learned, in a few minutes on a laptop.

Fashion-MNIST is taken from the Hub where it can be reached, else from Debian's package `dataset-fashion-mnist`, else
scikit-learn's digits stand in for it.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import set_seed

from hf_masked.data import labelled_tensors, load_images
from hf_masked.evaluation.features import ImageSettings, extract_features
from hf_masked.evaluation.report import evaluate_encoder, evaluate_raw_pixels, write_report
from hf_masked.modeling.registry import get_variant
from hf_masked.training.cli import make_model, train
from hf_masked.training.export import export_encoder
from hf_masked.training.recipes import parse
from hf_masked.training.visualization import embedding_plot

RECIPE = Path(__file__).parents[1] / "recipes" / "mae_fashion_mnist.yaml"

# Pictures that the frozen encoders are judged with, of each split; all of them would take longer than the training.
JUDGED = 2000
EMBEDDED = 1000

# Share of the labels that fine-tuning gets, and its steps.
LABELS, STEPS = 0.01, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo_output")
    parser.add_argument("--epochs", type=float, default=0.6)
    parser.add_argument("--dataset_name", default="fashion_mnist")
    arguments = parser.parse_args()
    output = Path(arguments.output_dir)
    started = time.perf_counter()

    flags = ["--output_dir", str(output), "--num_train_epochs", str(arguments.epochs)]
    flags += ["--dataset_name", arguments.dataset_name, "--resume_from_checkpoint", "no"]
    flags += ["--probe_every_epochs", "0.5", "--probe_samples", "1000", "--save_strategy", "no"]
    method, data, args = parse(["--config", str(RECIPE), *flags])
    set_seed(args.seed)
    untrained = make_model(get_variant(method.method), method).backbone
    trainer = train(method, data, args)
    pretrained, processor = trainer.model.backbone, trainer.processing_class

    print("\nJudging the encoders ...", flush=True)
    sources = [load_images(data.dataset_name, split) for split in (data.train_split, data.test_split)]
    train_set, test_set = (labelled_tensors(source, processor, limit=JUDGED) for source in sources)
    every_label = labelled_tensors(sources[0], processor)
    settings = ImageSettings.of_processor(processor)
    rows = {"raw pixels": evaluate_raw_pixels(train_set, test_set)}
    # Decaying the learning rate towards the input is for encoders that know something.
    encoders = {
        "untrained / from scratch": (untrained, {"layer_decay": None, "base_learning_rate": 8e-3}),
        "pretrained": (pretrained, {}),
    }
    for name, (encoder, options) in encoders.items():
        rows[name] = evaluate_encoder(encoder, settings, train_set, test_set, finetune=())
        rows[name] |= evaluate_encoder(
            encoder, settings, every_label, test_set, knn=False, linear=(), finetune=(LABELS,),
            finetune_options={"steps": STEPS} | options,
        )  # fmt: skip

    export_encoder(trainer.model, processor, output / "encoder", rgb=True)
    images, labels = (tensor[:EMBEDDED] for tensor in test_set)
    features = extract_features(pretrained, images, mean=settings.mean, std=settings.std)
    embedding_plot(features, labels, output / "pictures" / "embedding.png", sources[1].class_names)
    report = write_report(
        output / "demo.json", rows, checkpoint=str(output), dataset=sources[0].name,
        seconds=time.perf_counter() - started,
    )  # fmt: skip
    print_table(rows, report)
    print_files(output)


def print_table(rows: dict, report: dict) -> None:
    columns = {
        f"fine-tuned, {LABELS:.0%} of labels": f"finetune_{LABELS}",
        "linear probe": "linear_batchnorm",
        "kNN": "knn",
    }
    print(f"\n{report['dataset']}, accuracy on {JUDGED} test pictures ({report['seconds']:.0f} s in all)\n")
    print(f"{'':26}" + "".join(f"{title:>28}" for title in columns))
    for name in ("untrained / from scratch", "pretrained", "raw pixels"):
        cells = [f"{rows[name][key]['accuracy']:.3f}" if key in rows[name] else "-" for key in columns.values()]
        print(f"{name:26}" + "".join(f"{cell:>28}" for cell in cells))
    print(
        "\nThe pictures are simple enough for raw pixels to do well in kNN; what pretraining is for shows in the\n"
        "first column. The laptop recipe trains longer (see README)."
    )


def print_files(output: Path) -> None:
    pictures = output / "pictures"
    files = {
        "checkpoint": output,
        "plain encoder": output / "encoder",
        "reconstructions": sorted(pictures.glob("step-*.png"))[-1],
        "embedding plot": pictures / "embedding.png",
        "loss curve": pictures / "loss.png",
        "all figures": output / "demo.json",
    }
    print("\nWrote")
    for name, path in files.items():
        print(f"  {name:18}{path}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
