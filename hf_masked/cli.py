"""The command line: `hf-masked list`, `info`, `convert`, `export`, `evaluate`, `finetune`, ..."""

import inspect
import json
import os
import sys
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Masked modelling and Siamese learning for transformers. Pretraining itself: accelerate launch train.py",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")]
DatasetName = Annotated[
    str, typer.Option(help="Hub id, folder of images, Parquet, `fashion_mnist` or `digits`; with labels.")
]
Output = Annotated[Path, typer.Argument(help="Folder to write.")]


@app.command("list")
def list_methods(
    masks: Annotated[
        bool, typer.Option("--masks", help="The kinds of masks instead, which any `mask_kind` takes.")
    ] = False,
) -> None:
    """Every method on one line."""
    from hf_masked import CATALOGUE
    from hf_masked.modeling.registry import load_later_families
    from hf_masked.processing.masks import MASKS

    if masks:
        _table(
            [("mask", "what it is"), *((kind, inspect.getdoc(mask).splitlines()[0]) for kind, mask in MASKS.items())]
        )
        return
    missing = load_later_families()
    rows = [("method", "year", "family", "data", "backbones", "masks", "predicts")]
    for name, variant in sorted(CATALOGUE.items()):
        config = variant.config
        backbones = ", ".join(config.backbones[:3]) + (" ..." if len(config.backbones) > 3 else "")
        facts = (str(config.paper_year), variant.family, config.modality, backbones, config.masks, config.predicts)
        rows.append((name, *facts))
    _table(rows)
    for family, extra in missing.items():
        typer.echo(f"More in {family} after: pip install 'hf-masked[{extra}]'")


def _table(rows: list[tuple[str, ...]]) -> None:
    """Prints columns as wide as what stands in them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
def info(method: Annotated[str, typer.Argument(help="Name of a method, see `hf-masked list`.")]) -> None:
    """One method: paper, classes, settings."""
    from hf_masked import get_variant

    variant = get_variant(method)
    config = variant.config
    facts = {
        "paper": f"{config.paper_title} ({config.paper_year}), https://arxiv.org/abs/{config.arxiv_id}",
        "reference": config.reference_repository or "no public implementation",
        "official weights": f"{config.weights_licence}; `hf-masked convert {method} FILE OUT`"
        if variant.convert
        else "none",
        "kind, family, data": f"{variant.kind}, {variant.family}, {config.modality}",
        "backbones": ", ".join(config.backbones),
        "masks": config.masks,
        "predicts": config.predicts,
        "classes": ", ".join(c.__name__ for c in variant.classes),
        "processor": variant.processor,
        "declined checks": "; ".join(f"{k}: {v}" for k, v in variant.declined_checks.items()) or "none",
    }
    for name, value in facts.items():
        typer.echo(f"{name:<20}{value}")
    typer.echo(f"\n{inspect.cleandoc(config.__doc__)}")


@app.command()
def convert(
    method: Annotated[str, typer.Argument(help="Name of a method.")],
    file: Annotated[Path, typer.Argument(help="Official checkpoint, e.g. mae_pretrain_vit_base.pth.")],
    output: Output,
    config: Annotated[
        Path | None, typer.Option(help="A config.json, where the checkpoint's shapes do not tell it.")
    ] = None,
) -> None:
    """Official weights into this package's layout."""
    import hf_masked
    from hf_masked.modeling.conversion import convert as convert_file
    from hf_masked.training.cards import licence_id, write_card

    variant = hf_masked.get_variant(method)
    model = convert_file(variant, file, variant.config.from_json_file(config) if config else None)
    model.save_pretrained(output)
    processor = getattr(hf_masked, variant.config.processor)(**model.config.processor_settings())
    processor.save_pretrained(output)
    write_card(output, licence=licence_id(variant.config.weights_licence))
    typer.echo(f"Wrote {output}: {type(model).__name__}. The weights' licence: {variant.config.weights_licence}.")


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Output,
    rgb: Annotated[
        bool, typer.Option("--rgb", help="Make an encoder of gray pictures take RGB, as pipelines give them.")
    ] = False,
) -> None:
    """The plain encoder, which loads where hf_masked is not installed."""
    from transformers import AutoModelForPreTraining

    import hf_masked  # noqa: F401 (registers the methods)
    from hf_masked.training.export import export_encoder
    from hf_masked.training.hub import processor_of

    model = AutoModelForPreTraining.from_pretrained(checkpoint)
    export_encoder(model, processor_of(model), output, rgb=rgb)
    what = " and its image processor" if model.config.modality == "image" else ""
    typer.echo(f"Wrote {output}: a plain {type(model.backbone).__name__}{what}.")


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    dataset_name: DatasetName = "fashion_mnist",
    knn: Annotated[bool, typer.Option(help="Weighted k nearest neighbours.")] = True,
    linear: Annotated[
        list[str],
        typer.Option(help="Heads of linear probes: batchnorm, reference, logistic."),
    ] = ["batchnorm"],  # noqa: B006
    retrieve: Annotated[
        bool, typer.Option("--retrieval", help="Recall@k and mean average precision among the test pictures.")
    ] = False,
    one_shot: Annotated[
        int, typer.Option(help="Ways of one-shot questions about the test pictures, e.g. 20; 0 for none.")
    ] = 0,
    propagation: Annotated[
        bool, typer.Option("--propagation", help="Instead: carry masks through the clips of a folder like DAVIS's.")
    ] = False,
    finetune: Annotated[list[str], typer.Option(help="Shares of labels to fine-tune with, e.g. 1%, or counts.")] = [],  # noqa: B006
    train_split: str = "train",
    test_split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    limit: Annotated[int | None, typer.Option(help="Training pictures at most.")] = None,
    seed: int = 0,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; by default evaluation.json in the checkpoint.")
    ] = None,
) -> None:
    """Judges an encoder, ours or any of transformers, on labelled pictures; writes JSON.

    A model of stereo matching is judged on pairs with disparities.
    """
    from hf_masked.evaluation.features import load_encoder
    from hf_masked.evaluation.report import evaluate_encoder, write_report
    from hf_masked.training.cards import hub_id, write_card

    if _matches_stereo(checkpoint):
        results, name = _judged_on_pairs(checkpoint, dataset_name, test_split)
    elif propagation:
        results, name = _judged_on_clips(checkpoint, dataset_name)
    else:
        encoder, settings = load_encoder(checkpoint)
        train, test, name, _ = _labelled(
            dataset_name, settings, (train_split, test_split), image_column, label_column, limit, seed
        )
        results = evaluate_encoder(
            encoder,
            settings,
            train,
            test,
            knn=knn,
            linear=tuple(linear),
            retrieve=retrieve,
            one_shot=one_shot,
            finetune=tuple(_share_or_count(text) for text in finetune),
            seed=seed,
        )
    for measure, figures in results.items():
        typer.echo(f"{measure:<24}" + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    path = output or (Path(checkpoint) / "evaluation.json" if Path(checkpoint).is_dir() else Path("evaluation.json"))
    write_report(
        path,
        results,
        checkpoint=checkpoint,
        dataset=name,
        dataset_id=hub_id(dataset_name),
        test_split=test_split,
        seed=seed,
    )
    typer.echo(f"Wrote {path}.")
    if (path.parent / "README.md").exists():
        write_card(path.parent)


@app.command()
def finetune(
    checkpoint: Checkpoint,
    output: Output,
    dataset_name: DatasetName = "fashion_mnist",
    labels: Annotated[str, typer.Option(help="Share of the labels to use (1%, 100%) or their number.")] = "100%",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: int = 64,
    regularizer: Annotated[
        str | None, typer.Option(help="cutout, manifold_mixup or masksub: what helps against overfitting.")
    ] = None,
    regularizer_options: Annotated[str, typer.Option(help="Its settings, for example '{length: 8}'.")] = "{}",
    train_split: str = "train",
    test_split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> None:
    """Fine-tunes an encoder into a plain classifier that `pipeline("image-classification")` serves."""
    from hf_masked.evaluation.features import load_encoder
    from hf_masked.evaluation.finetune import few_label_subset
    from hf_masked.evaluation.finetune import finetune as finetune_encoder

    encoder, settings = load_encoder(checkpoint)
    (images, classes), test, _, names = _labelled(
        dataset_name, settings, (train_split, test_split), image_column, label_column, None, seed
    )
    chosen = few_label_subset(classes, _share_or_count(labels), seed)
    figures = finetune_encoder(
        encoder,
        images[chosen],
        classes[chosen],
        *test,
        settings=settings,
        steps=steps,
        batch_size=batch_size,
        regularizer=_regularizer(regularizer, regularizer_options),
        seed=seed,
        label_names=names,
        output_dir=str(output),
        training_arguments={"disable_tqdm": not sys.stderr.isatty()},
    )
    typer.echo(json.dumps(figures))
    typer.echo(f"Wrote {output}: a plain classifier and its image processor.")


@app.command()
def visualize(
    checkpoint: Checkpoint,
    images: Annotated[
        list[Path], typer.Argument(help="Files, or folders of them; those of a pair one after the other.")
    ],
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("visualization.png"),
    rows: Annotated[int, typer.Option(help="Pictures, or pairs, drawn at most.")] = 8,
    nearest: Annotated[
        int, typer.Option(help="Instead: so many nearest neighbours of the first pictures among all, by the encoder.")
    ] = 0,
) -> None:
    """Draws what a method masks and what it predicts, or the views that it compares, or what it finds alike."""
    import hf_masked  # noqa: F401 (registers the methods)

    picture = _neighbours(checkpoint, images, rows, nearest) if nearest else _panels(checkpoint, images, rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    typer.echo(f"Wrote {output}.")


def _panels(checkpoint: str, files: list[Path], rows: int):
    """What a method masks and predicts, or compares."""
    from transformers import AutoModelForPreTraining

    from hf_masked.training.hub import processor_of
    from hf_masked.training.modalities import modality_of

    model = AutoModelForPreTraining.from_pretrained(checkpoint).eval()
    modality, processor = modality_of(model.config), processor_of(model)
    return modality.picture(model, processor, modality.from_files(files, processor, model.config, rows))


def _neighbours(checkpoint: str, images: list[Path], rows: int, count: int):
    """The first picture of each folder, then the second of each, ..., with their nearest neighbours among all; folders
    are classes, where there are several."""
    from hf_masked.data.folders import readable_pictures
    from hf_masked.evaluation.features import extract_features, load_encoder
    from hf_masked.evaluation.retrieval import nearest
    from hf_masked.training.visualization import retrieval_grid

    encoder, settings = load_encoder(checkpoint)
    found = readable_pictures(images)
    by_folder = groupby(sorted(found), key=lambda path: path.parent)
    paths = [path for turn in zip_longest(*(list(files) for _, files in by_folder)) for path in turn if path]
    pixels = _processor_for(settings).prepare([found[path] for path in paths])
    features = extract_features(encoder, pixels, mean=settings.mean, std=settings.std)
    similarity, neighbours = nearest(features, min(rows, len(paths)), count)
    classes = [path.parent.name for path in paths]
    return retrieval_grid(pixels / 255, similarity, neighbours, classes if len(set(classes)) > 1 else None)


@app.command()
def explain(
    checkpoint: Checkpoint,
    first: Annotated[str, typer.Argument(help="A text, or for an encoder of pictures a file.")],
    second: Annotated[str, typer.Argument(help="What it is compared with.")],
    layer: Annotated[
        int, typer.Option(help="Whose input is explained: 0 is the embeddings' output, -1 the last layer's input.")
    ] = -1,
    num_steps: Annotated[int, typer.Option(help="Of the integral; more make the completeness error smaller.")] = 50,
    rule: Annotated[str, typer.Option(help="midpoint, or right.")] = "midpoint",
    similarity: Annotated[str | None, typer.Option(help="cosine or dot; by default the model's own.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or cls; by default the model's own.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="What counts as empty: pad for texts; zeros or blur for pictures.")
    ] = None,
    top: Annotated[int, typer.Option(help="Pairs to print.")] = 10,
    special: Annotated[bool, typer.Option(help="Show class and separator tokens too.")] = False,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("explanation.png"),
    html: Annotated[Path | None, typer.Option(help="HTML file to write, a table of tokens by tokens.")] = None,
) -> None:
    """Shows which tokens, or patches, of two inputs make an encoder call them similar (Siamese attribution)."""
    import hf_masked  # noqa: F401 (registers the methods)
    from hf_masked.evaluation.attribution import SiameseAttributor
    from hf_masked.processing.decoding import open_image

    attributor = SiameseAttributor.from_pretrained(
        checkpoint,
        layer=layer,
        num_steps=num_steps,
        rule=rule,
        similarity=similarity,
        reference=reference,
        **({"pooling": pooling} if pooling else {}),  # else what the checkpoint says
    )
    inputs = [open_image(name, name) if attributor.takes_pictures else name for name in (first, second)]
    found = attributor.explain(*inputs)
    figures = {"similarity": found.score, **found.reference_terms, "sum of all pairs": found.attributions.sum().item()}
    for name, value in figures.items():
        typer.echo(f"{name:<24}{value:.4f}")
    typer.echo(f"{'completeness error':<24}{found.completeness_error:.2g}\n")
    shown = found if special else found.drop_special()
    if not special:
        typer.echo(f"Without special tokens, whose pairs hold {shown.left_out:.4f} of the sum:")
    rows = [(pair.token_a, pair.token_b, f"{pair.attribution:+.4f}") for pair in shown.top_pairs(top)]
    _table([("first", "second", "adds"), *rows])
    output.parent.mkdir(parents=True, exist_ok=True)
    shown.picture().save(output)
    typer.echo(f"Wrote {output}.")
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(shown.to_html(), encoding="utf-8")
        typer.echo(f"Wrote {html}.")


@app.command()
def disparity(
    checkpoint: Checkpoint,
    left: Annotated[Path, typer.Argument(help="Left picture of a rectified pair.")],
    right: Annotated[Path, typer.Argument(help="Right picture, of the same size.")],
    output: Annotated[Path, typer.Option(help="PNG file of the map in colours.")] = Path("disparity.png"),
    values: Annotated[
        Path | None, typer.Option(help="PNG file of the disparities themselves, 16 bits, value / 256, as KITTI's.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Disparities of the left picture to compare with, PNG or PFM; 0 = unknown.")
    ] = None,
    truth_scale: Annotated[float, typer.Option(help="Its value / this is the disparity; 4 for Middlebury's.")] = 256.0,
) -> None:
    """Matches a stereo pair: the disparity of each pixel of the left picture."""
    import hf_masked  # noqa: F401 (registers the methods)
    from hf_masked.evaluation.stereo import StereoMatcher, stereo_errors
    from hf_masked.processing.stereo import read_disparity

    found = StereoMatcher.from_pretrained(checkpoint)(str(left), str(right))
    smallest, median, largest = found.disparity.flatten().quantile(found.disparity.new_tensor([0, 0.5, 1])).tolist()
    typer.echo(f"disparity in pixels: {smallest:.1f} to {largest:.1f}, median {median:.1f}")
    if truth:
        for name, value in stereo_errors(found.disparity, read_disparity(truth, truth_scale)).items():
            typer.echo(f"{name:<20}{value:.4g}")
    output.parent.mkdir(parents=True, exist_ok=True)
    found.picture().save(output)
    typer.echo(f"Wrote {output}.")
    if values:
        values.parent.mkdir(parents=True, exist_ok=True)
        found.save(values)
        typer.echo(f"Wrote {values}.")


@app.command()
def cache(
    dataset_name: Annotated[str, typer.Argument(help="Hub id, folder of images, Parquet or tar files.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; then --dataset_name of train.py.")],
    size: Annotated[int, typer.Option(help="Short side of the pictures; larger ones are made smaller.")] = 256,
    num_channels: Annotated[int, typer.Option(help="1 (gray), 3 (RGB), or that of the arrays.")] = 3,
    split: Annotated[list[str], typer.Option(help="By default train, test and validation, where there are.")] = [],  # noqa: B006
    image_column: str | None = None,
    label_column: str | None = None,
    max_bad_share: Annotated[float, typer.Option(help="More unreadable pictures than this share are an error.")] = 0.1,
    num_workers: Annotated[int, typer.Option(help="Processes that decode.")] = os.cpu_count() or 1,
) -> None:
    """Decodes a data set once and keeps it as small uint8 pictures, which feed training several times faster."""
    from hf_masked.data import load_images
    from hf_masked.data.cached import write_cache

    sources, reasons = {}, []
    for name in split or ("train", "test", "validation"):
        try:
            sources[name] = load_images(dataset_name, name, image_column=image_column, label_column=label_column)
        except ValueError as error:
            reasons.append(error)
    if not sources or (split and reasons):
        raise reasons[0]
    written = write_cache(sources, output, size, num_channels, num_workers, max_bad_share)
    for name, (good, bad) in written.items():
        typer.echo(f"{name}: {good} pictures" + (f", {bad} bad ones left out" if bad else ""))
    typer.echo(f"Wrote {output}: train.py --dataset_name {output}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Output folder of a run, or of `convert` or `finetune`.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch that exists; by default main.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload with hf_masked",
) -> None:
    """Uploads a checkpoint with its encoder, pictures and card; also after a push that failed, without training."""
    from hf_masked.training.hub import complete_folder, push_folder

    complete_folder(folder, repo_id)
    commit = push_folder(folder, repo_id, private=private or None, revision=revision, commit_message=message)
    typer.echo(f"Pushed {folder}: {commit.commit_url}")


def _regularizer(name: str | None, options: str):
    import yaml

    from hf_masked.modeling.registry import get_variant

    if name is None:
        return None
    variant = get_variant(name)
    if variant.kind != "method":
        raise ValueError(
            f"{name} is a {variant.kind}, which helps no supervised learner: `hf-masked list` shows those."
        )
    try:
        return variant.method(variant.config(**yaml.safe_load(options)))
    except TypeError as error:
        raise ValueError(f"{name} has no such settings: {options} ({error}).") from error


def _matches_stereo(checkpoint: str) -> bool:
    from transformers import AutoConfig

    import hf_masked  # noqa: F401 (registers the methods)

    return getattr(AutoConfig.from_pretrained(checkpoint), "sample", None) == "stereo"


def _judged_on_pairs(checkpoint: str, dataset_name: str, split: str) -> tuple[dict, str]:
    """Errors of disparities, and the name of the pairs."""
    from hf_masked.data.stereo import load_stereo
    from hf_masked.evaluation.stereo import StereoMatcher, evaluate_pairs

    matcher = StereoMatcher.from_pretrained(checkpoint)
    config, size = matcher.model.config, tuple(matcher.processor.size.values())
    source = load_stereo(dataset_name, split, size, config.max_disparity, config.num_channels)
    return {"stereo": evaluate_pairs(matcher, source)}, source.name


def _judged_on_clips(checkpoint: str, folder: str) -> tuple[dict, str]:
    """J and F of masks that are carried through clips, and the name of these."""
    from hf_masked.data.annotated_clips import annotated_clips
    from hf_masked.evaluation.features import load_encoder
    from hf_masked.evaluation.label_propagation import evaluate_clips

    encoder, settings = load_encoder(checkpoint)
    clips = annotated_clips(folder, settings.num_channels)
    return {"label_propagation": evaluate_clips(encoder, settings, clips)}, folder


def _processor_for(settings):
    """Makes whole pictures into what an encoder with these settings takes, but for the normalisation."""
    from hf_masked import MaskedImageProcessor

    return MaskedImageProcessor(
        size=settings.size, num_channels=settings.num_channels, crop_fraction=1.0, mask_kind=None
    )


def _labelled(dataset_name, settings, splits, image_column, label_column, limit, seed):
    """Training and test pictures with labels, the data set's name and its classes' names."""
    from hf_masked.data import labelled_tensors, load_images

    processor = _processor_for(settings)
    sources = [
        load_images(dataset_name, split, image_column=image_column, label_column=label_column) for split in splits
    ]
    train = labelled_tensors(sources[0], processor, limit=limit, seed=seed)
    return train, labelled_tensors(sources[1], processor), sources[0].name, sources[0].class_names


def _share_or_count(text: str) -> float | int:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither a share such as 1% nor a number of labels such as 600.") from error


def main() -> None:
    """Entry point: a mistake of the user's, or a failure of the Hub, ends with one line and status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"hf-masked: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
