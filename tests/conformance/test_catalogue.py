"""Every file of a family is in the catalogue, with its facts, card and recipes."""

from pathlib import Path

import pytest

import hf_masked
from hf_masked.modeling.registry import CATALOGUE, load_later_families
from hf_masked.training.modalities import Modality, modality_of
from hf_masked.training.recipes import read_recipe

ROOT = Path(__file__).parents[2]

# Files of a family that are no method.
SHARED = {"peft_bridge"}

MISSING = load_later_families()
TUNERS = [variant for variant in CATALOGUE.values() if variant.kind == "tuner"]
tuners = pytest.mark.parametrize("tuner", TUNERS, ids=[variant.name for variant in TUNERS])


def test_every_file_of_a_family_is_registered():
    files = {
        path.stem
        for path in (ROOT / "hf_masked" / "modeling").glob("*/*.py")
        if path.parent.name not in {"parts", *MISSING} and path.stem not in SHARED and not path.stem.startswith("_")
    }
    configs = [variant.config for variant in CATALOGUE.values()]
    models = [variant for variant in CATALOGUE.values() if variant.kind not in ("tuner", "method")]
    encoders = [type(variant.tiny_config().backbone_config) for variant in models]
    own = [encoder for encoder in encoders if encoder.__module__.startswith("hf_masked.")]
    assert files == {config.__module__.rsplit(".", 1)[-1] for config in configs + own}


def test_facts_of_the_paper_stand_on_the_config(variant):
    check_facts(variant.config)


@tuners
def test_facts_of_the_paper_stand_on_a_tuners_config(tuner):
    check_facts(tuner.config)


def check_facts(config):
    assert config.paper_title and 1990 < config.paper_year < 2030
    assert config.arxiv_id is None or len(config.arxiv_id.split(".")) == 2
    assert config.masks and config.predicts and config.backbones
    assert config.arxiv_id in (config.__module__ and __import__(config.__module__, fromlist=["_"]).__doc__)


def test_modality_is_one_that_the_training_program_knows(variant):
    assert isinstance(modality_of(variant.config), Modality)


def test_classes_are_public_and_documented(variant):
    for kind in (variant.config, variant.model, variant.pretraining):
        assert getattr(hf_masked, kind.__name__) is kind
        assert kind.__doc__ and kind.__doc__ != kind.__mro__[1].__doc__


@tuners
def test_tuners_are_public_and_documented(tuner):
    for kind in tuner.classes:
        assert getattr(hf_masked, kind.__name__) is kind and kind.__name__ not in hf_masked.__all__
        assert kind.__doc__ and kind.__doc__ != kind.__mro__[1].__doc__


@tuners
def test_a_tuners_card_and_its_place_in_the_example_are_there(tuner):
    card = (ROOT / "model_cards" / f"{tuner.name}.md").read_text()
    assert tuner.config.paper_title in card and tuner.config.arxiv_id in card
    assert all(reason in card for reason in tuner.declined_checks.values())
    # Tuners are trained by the ordinary Trainer, so they have no recipes of train.py.
    assert f'"{tuner.name}"' in (ROOT / "examples" / "tune_with_masks.py").read_text()
    assert not recipes_of(tuner.name)


def test_lazy_names_are_those_of_the_family():
    if "weight_masking" in MISSING:
        pytest.skip("PEFT is not installed.")
    from hf_masked.modeling import weight_masking

    assert set(hf_masked._WEIGHT_MASKING) == set(weight_masking.__all__)
    with pytest.raises(AttributeError, match="FishMaskConfg"):
        _ = hf_masked.FishMaskConfg


def test_card_and_recipes_are_there(variant):
    card = (ROOT / "model_cards" / f"{variant.name}.md").read_text()
    assert variant.config.paper_title in card and variant.config.arxiv_id in card
    for check, reason in variant.pretraining.declined_checks.items():
        assert reason in card, f"the card does not show why {check} is declined"
    assert len(recipes_of(variant.name)) >= 2, "a paper-sized and a laptop-sized recipe"


def recipes_of(name: str) -> list[Path]:
    """Recipes of a method, whose names may begin with another's."""
    paths = (ROOT / "recipes").glob(f"{name}_*.yaml")
    return [path for path in paths if read_recipe(path)["method"] == name]


def test_recipes_can_be_read_and_built(variant, tmp_path, monkeypatch):
    import torch
    from transformers import AutoConfig

    from hf_masked.training.cli import make_processor
    from hf_masked.training.recipes import parse

    # The laptop recipes' teacher and tokenizer, as far as making a student needs them.
    monkeypatch.chdir(tmp_path)
    encoder = read_recipe(ROOT / "recipes" / "mae_fashion_mnist.yaml")["model"]["backbone_config"]
    AutoConfig.for_model(**encoder).save_pretrained("runs/mae_fashion_mnist/encoder")
    tokenizer = read_recipe(ROOT / "recipes" / "vqkd_fashion_mnist.yaml")["model"]
    hf_masked.VQKDConfig(**tokenizer).save_pretrained("runs/vqkd_fashion_mnist")
    for path in recipes_of(variant.name):
        method, _, _ = parse(
            ["--config", str(path), "--output_dir", "/nowhere", "--use_cpu", "true", "--bf16", "false"]
        )
        assert method.method == variant.name
        with torch.device("meta"):
            model = variant.pretraining(variant.config(**method.model))
        make_processor(variant, model, method)


def test_cost_is_measured_with_the_papers_recipe(variant):
    from benchmarks.cost import paper_recipes

    if variant.config.modality != "image":
        pytest.skip("The benchmark has pictures only.")
    assert variant.name in paper_recipes()
