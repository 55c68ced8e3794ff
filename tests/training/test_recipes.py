"""Recipes and flags: later ones win, mistakes are named."""

import pytest

from hf_masked.training.recipes import RecipeError, parse, read_recipe

RECIPE = """
method: mae
model:
  mask_ratio: 0.75
  backbone_config: {model_type: vit, hidden_size: 32}
processor: {crop_scale: [0.5, 1.0]}
data: {dataset_name: digits}
optimization:
  learning_rate: 1e-3
  num_train_epochs: 3
efficiency:
  output_dir: somewhere
  report_to: none
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_blocks_are_flattened_and_nested_settings_kept(recipe):
    method, data, args = parse(["--config", recipe])
    assert method.method == "mae" and data.dataset_name == "digits"
    assert method.model == {"mask_ratio": 0.75, "backbone_config": {"model_type": "vit", "hidden_size": 32}}
    assert method.processor == {"crop_scale": [0.5, 1.0]}
    assert args.learning_rate == 1e-3 and args.num_train_epochs == 3 and args.output_dir == "somewhere"


def test_flags_override_the_recipe(recipe):
    flags = ["--learning_rate", "5e-4", "--model.mask_ratio", "0.6", "--model.backbone_config.hidden_size=64"]
    method, _, args = parse(["--config", recipe, *flags, "--processor.crop_scale", "[0.2, 1]"])
    assert args.learning_rate == 5e-4
    assert method.model == {"mask_ratio": 0.6, "backbone_config": {"model_type": "vit", "hidden_size": 64}}
    assert method.processor == {"crop_scale": [0.2, 1]}


def test_flags_alone_are_enough(tmp_path):
    method, data, _ = parse(["--method", "mae", "--dataset_name", "digits", "--output_dir", str(tmp_path)])
    assert method.model == {} and data.train_split == "train"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "recipes"]),
        (["--config"], ["--config", "path"]),
        (["--method", "mae", "--dataset_name", "digits", "--lerning_rate", "1"], ["lerning_rate", "learning_rate"]),
        (["--dataset_name", "digits"], ["--method"]),
        (["--method", "mae"], ["--dataset_name"]),
        (["--method", "mae", "--dataset_name", "digits", "--model.mask_ratio"], ["--model.mask_ratio", "value"]),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(RecipeError) as error:
        parse(arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_setting_in_a_recipe_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + "  num_train_epoch: 4\n")
    with pytest.raises(RecipeError, match=r"'num_train_epoch'.*'num_train_epochs'"):
        parse(["--config", str(path)])


def test_a_recipe_that_is_no_mapping_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- mae\n")
    with pytest.raises(RecipeError, match="no mapping"):
        read_recipe(path)


def test_help_tells_of_recipes_and_nested_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--config RECIPE.yaml" in text and "--model.mask_ratio" in text and "--base_learning_rate" in text
