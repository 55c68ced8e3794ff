"""Pages of the documentation that are made from the package: read by MkDocs (`hooks` in mkdocs.yml).

The README becomes the first page and CONTRIBUTING.md the page on adding a method; each family of the catalogue gets a
page with a line and, where there is one, a picture of every method; each card of `model_cards/` becomes a page; the
reference lists the public classes.
"""

import posixpath
import re
from collections import defaultdict
from pathlib import Path

from mkdocs.structure.files import File

import hf_masked
from hf_masked.modeling.registry import CATALOGUE, TunerVariant, Variant, load_later_families

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#]+)(#[^)]*)?\)")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)

FAMILIES = {
    "masked_image": "Masked image modelling: pixels, gradients, frequencies",
    "masked_latent": "Masked image modelling: features, tokens, clusters",
    "siamese": "Siamese and pair learning",
    "masked_video": "Masked video modelling",
    "masked_points": "Masked point clouds",
    "masked_graph": "Masked graphs",
    "masked_generation": "Masked generation",
    "masked_language": "Masked language modelling",
    "masked_supervision": "Masks as a supervised learner's helper",
    "weight_masking": "Masks on weights",
}

# The site shows the tuners too, wherever it is built.
if load_later_families():
    raise SystemExit(f"The site needs the extras {', '.join(load_later_families().values())} of hf-masked.")

# Files and folders of the repository -> pages that are made of them.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "model_cards": "methods/index.md"}

# Modules whose public functions and classes the reference shows beside the models.
MODULES = [
    "hf_masked.modeling.registry",
    "hf_masked.modeling.base",
    "hf_masked.modeling.masked_patches",
    "hf_masked.modeling.weight_masking.peft_bridge",
    "hf_masked.modeling.projected_views",
    "hf_masked.modeling.regularizers",
    "hf_masked.modeling.outputs",
    "hf_masked.processing.image_processing",
    "hf_masked.processing.multi_view",
    "hf_masked.processing.crop_pairs",
    "hf_masked.processing.stereo",
    "hf_masked.processing.video_processing",
    "hf_masked.processing.point_processing",
    "hf_masked.processing.graph_processing",
    "hf_masked.processing.text_processing",
    "hf_masked.processing.pixel_tokens",
    "hf_masked.processing.masks",
    "hf_masked.randomness",
    "hf_masked.data.sources",
    "hf_masked.data.images",
    "hf_masked.data.sets",
    "hf_masked.data.keyed",
    "hf_masked.data.video",
    "hf_masked.data.points",
    "hf_masked.data.graphs",
    "hf_masked.data.text",
    "hf_masked.data.annotated_clips",
    "hf_masked.training.trainer",
    "hf_masked.training.arguments",
    "hf_masked.training.callbacks",
    "hf_masked.training.mask_callbacks",
    "hf_masked.training.regularized",
    "hf_masked.training.modalities",
    "hf_masked.training.export",
    "hf_masked.training.hub",
    "hf_masked.evaluation.report",
    "hf_masked.evaluation.features",
    "hf_masked.evaluation.knn",
    "hf_masked.evaluation.linear_probe",
    "hf_masked.evaluation.finetune",
    "hf_masked.evaluation.retrieval",
    "hf_masked.evaluation.one_shot",
    "hf_masked.evaluation.label_propagation",
    "hf_masked.evaluation.stereo",
    "hf_masked.evaluation.attribution",
]


def on_files(files, config):
    texts = {uri: ROOT / path for path, uri in PAGES.items() if path.endswith(".md")}
    made = {uri: moved(path.read_text(), path, uri) for uri, path in texts.items()}
    made |= {f"cards/{name}.md": card(variant) for name, variant in CATALOGUE.items()}
    made |= method_pages() | {"reference.md": reference()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def moved(text: str, source: Path, uri: str) -> str:
    """A page of the repository with its links as they are seen from `uri` in the site."""

    def link(match: re.Match) -> str:
        label, path, anchor = match.groups()
        target = (source.parent / path).resolve().relative_to(ROOT).as_posix().rstrip("/")
        place = PAGES.get(target)
        if target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif target.startswith("model_cards/"):
            place = f"cards/{target.removeprefix('model_cards/')}"
        if place is None:  # a file of the repository that the site does not hold
            return label
        return f"[{label}]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor or ''})"

    return LINK.sub(link, text)


def card(variant: Variant | TunerVariant) -> str:
    text = FRONT_MATTER.sub("", (ROOT / "model_cards" / f"{variant.name}.md").read_text())
    return moved(text, ROOT / "model_cards" / "_", f"cards/{variant.name}.md")


def method_pages() -> dict[str, str]:
    families = defaultdict(list)
    for variant in CATALOGUE.values():
        families[variant.family].append(variant)
    pages, lines = {}, ["# Methods\n", f"{len(CATALOGUE)} entries in {len(families)} families.\n"]
    for family, variants in families.items():
        title = FAMILIES[family]
        lines.append(f"- [{title}]({family}.md): {', '.join(sorted(variant.name for variant in variants))}")
        pages[f"methods/{family}.md"] = family_page(title, sorted(variants, key=lambda variant: variant.name))
    return pages | {"methods/index.md": "\n".join(lines) + "\n"}


def family_page(title: str, variants: list[Variant | TunerVariant]) -> str:
    rows = ["| method | paper | masks | predicts |", "|---|---|---|---|"]
    for variant in variants:
        facts = variant.config
        paper = f"{facts.paper_title} ({facts.paper_year})"
        if facts.arxiv_id:
            paper = f"[{paper}](https://arxiv.org/abs/{facts.arxiv_id})"
        rows.append(f"| [{variant.name}](../cards/{variant.name}.md) | {paper} | {facts.masks} | {facts.predicts} |")
    pictures = [
        f"## {variant.name}\n\n![What {variant.name} masks and predicts](../images/{variant.name}.png)\n"
        for variant in variants
        if (ROOT / "docs" / "images" / f"{variant.name}.png").exists()
    ]
    return f"# {title}\n\n" + "\n".join(rows) + "\n\n" + "\n".join(pictures)


def reference() -> str:
    methods = sorted({variant.config.__module__ for variant in CATALOGUE.values()})
    blocks = [f"::: {module}\n    options:\n      heading_level: 3\n" for module in MODULES]
    models = [f"::: {module}\n    options:\n      heading_level: 3\n" for module in methods]
    version = hf_masked.__version__
    return (
        f"# Reference\n\nhf_masked {version}.\n\n## Parts\n\n"
        + "\n".join(blocks)
        + "\n## Methods\n\n"
        + "\n".join(models)
    )
