"""The card of a checkpoint: what it says, what refreshing keeps, which licence it carries."""

import json
import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_masked import MaskedImageProcessor
from hf_masked.modeling.registry import get_variant
from hf_masked.training import cards
from hf_masked.training.cards import hub_id, licence_id, used_settings, write_card
from hf_masked.training.recipes import parse
from tests.hub_server import faults_of_card

ROOT = Path(__file__).parents[2]

RUN = {
    "method": "mae", "dataset": "Fashion-MNIST (Debian's dataset-fashion-mnist)", "dataset_id": None,
    "test_split": "test", "samples": 60000, "epochs": 5.0, "steps": 4685, "batch_size": 64, "learning_rate": 0.001,
    "measured": {"loss": 0.5, "loss_reconstruction": 0.5, "knn_accuracy": 0.838}, "probe_samples": 5000,
    "hardware": {"device": "some CPU", "torch_threads": 2, "cpu_count": 2}, "processes": 1,
    "versions": {"torch": "2.13.0"}, "recipe": {"method": "mae", "optimization": {"seed": 1}},
}  # fmt: skip

EVALUATION = {
    "dataset": "me/photos (train)", "dataset_id": "me/photos", "test_split": "validation",
    "results": {"knn": {"accuracy": 0.5, "seconds": 1.0}, "finetune_0.01": {"accuracy": 0.777}, "finetune_600": {
        "accuracy": 0.8}, "linear_batchnorm": {"accuracy": 0.85}, "features": {"effective_rank": 3.0}},
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "mine"
    variant = get_variant("mae")
    variant.tiny_config().save_pretrained(folder)
    MaskedImageProcessor(**variant.tiny_config().processor_settings()).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


def results(path: Path) -> dict:
    return {result.metric_name: result for result in ModelCard.load(path).data.eval_results or []}


def test_figures_and_their_origin_are_metadata(checkpoint):
    (checkpoint / "evaluation.json").write_text(json.dumps(EVALUATION))
    path = write_card(checkpoint, "me/mine")
    assert faults_of_card(path.read_text()) == []
    found = results(path)
    assert found["kNN accuracy while training (at most 5000 labels)"].metric_value == 0.838
    assert found["accuracy fine-tuned with 1% of the labels"].metric_value == 0.777
    assert found["accuracy fine-tuned with 600 labels"].metric_value == 0.8
    knn = found["kNN accuracy"]
    assert (knn.dataset_type, knn.dataset_split, knn.metric_value) == ("me/photos", "validation", 0.5)
    assert len(found) == 5 and ModelCard.load(path).data.model_name == "mine"


def test_refreshing_keeps_what_was_edited_and_the_repositorys_name(checkpoint):
    path = write_card(checkpoint, "me/mine")
    path.write_text(path.read_text().replace("## What it is for", "## My notes\n\nOn clothes.\n\n## What it is for"))
    (checkpoint / "evaluation.json").write_text(json.dumps(EVALUATION))
    text = write_card(checkpoint).read_text()
    assert "On clothes." in text and text.count("## This checkpoint") == 1
    assert 'from_pretrained("me/mine", subfolder="encoder")' in text and "0.777" in text
    assert write_card(checkpoint).read_text() == text, "a second refresh changes nothing"
    assert "me/mine" not in write_card(checkpoint, "me/other").read_text()


def test_somebody_elses_card_stays(checkpoint, caplog):
    (checkpoint / "README.md").write_text("# Mine\n")
    assert write_card(checkpoint).read_text() == "# Mine\n"
    assert "stays as it is" in caplog.text


def test_a_card_of_another_method_is_replaced(checkpoint):
    path = write_card(checkpoint)
    path.write_text(path.read_text().replace("checkpoint: mae ", "checkpoint: simmim ").replace("# MAE", "# SimMIM"))
    assert "# SimMIM" not in write_card(checkpoint).read_text()


def test_without_a_record_the_card_claims_nothing(checkpoint):
    (checkpoint / "run.json").unlink()
    path = write_card(checkpoint)
    assert "knows nothing of how they were trained" in path.read_text() and not results(path)


def test_a_loss_that_is_no_number_does_not_spoil_the_card(checkpoint):
    (checkpoint / "run.json").write_text(json.dumps(RUN | {"measured": {"loss": math.nan}}))
    path = write_card(checkpoint)
    assert "| last loss | nan |" in path.read_text() and faults_of_card(path.read_text()) == []


@pytest.mark.parametrize(("there", "licence"), [("---\nlicense: cc-by-nc-4.0\n---\n", "cc-by-nc-4.0"), ("# No", None)])
def test_weights_made_from_others_carry_their_licence(checkpoint, tmp_path, there, licence):
    backbone = tmp_path / "vit"
    backbone.mkdir()
    (backbone / "README.md").write_text(there)
    (checkpoint / "run.json").write_text(json.dumps(RUN | {"from_backbone": str(backbone)}))
    data = ModelCard.load(write_card(checkpoint)).data
    assert data.get("license") == licence and "base_model" not in data.to_dict()


def test_licences_are_the_hubs_words():
    assert licence_id("CC BY-NC 4.0") == "cc-by-nc-4.0" and licence_id("MIT") == "mit" and licence_id(None) is None


def test_only_names_on_the_hub_are_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "photos").mkdir(parents=True)
    assert hub_id("org/photos") == "org/photos"
    for name in ("my/photos", "./photos", "/photos", "digits", "https://a.b/c.parquet", "a/b/c"):
        assert hub_id(name) is None, name


def test_a_method_without_a_page_gets_the_papers_facts(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "TEMPLATES", tmp_path / "nowhere")
    content = write_card(checkpoint).read_text()
    assert get_variant("mae").config.paper_title in content and faults_of_card(content) == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recorded_settings_are_a_recipe_that_repeats_the_run(recipe, tmp_path):
    here = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    first = used_settings(*parse(["--config", str(recipe), "--dataset_name", "digits", "--seed", "7", *here]))
    assert json.loads(json.dumps(first)) == first, "run.json holds it"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first))
    again = parse(["--config", str(tmp_path / "again.yaml"), *here])
    assert used_settings(*again) == first and again[2].seed == 7
    original = parse(["--config", str(recipe), *here])[2]
    for name in ("weight_decay", "base_learning_rate", "num_train_epochs", "warmup_steps", "adam_beta2"):
        assert getattr(again[2], name) == getattr(original, name), name
