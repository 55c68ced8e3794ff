"""Pushing to the Hub, with the real client against a loopback server: all of it, half of it, and again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForPreTraining

import hf_masked  # noqa: F401 (registers the methods)
from tests.hub_server import faults_of_card, hub_server

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("hub")

PUBLISHED = {
    "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "run.json", "trainer_state.json",
    "encoder/config.json", "encoder/model.safetensors", "encoder/preprocessor_config.json", "pictures/loss.png",
}  # fmt: skip

# As where hf_masked is not installed.
PLAIN = """
import json, sys, torch
sys.modules["hf_masked"] = None
from transformers import AutoImageProcessor, AutoModel
encoder = AutoModel.from_pretrained("me/run", subfolder="encoder", add_pooling_layer=False)
processor = AutoImageProcessor.from_pretrained("me/run", subfolder="encoder")
torch.save(encoder.state_dict(), sys.argv[1])
print(json.dumps({"encoder": type(encoder).__module__, "size": dict(processor.size)}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after all scenes of `hub_client.py`, what these saw, and their folder."""
    folder = tmp_path_factory.mktemp("hub")
    with hub_server() as server:
        environment = server.environment(folder / "home") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.training.hub_client", str(folder)]
        client = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert client.returncode == 0, client.stderr[-5000:]
        server.control()
        yield server, json.loads((folder / "seen.json").read_text()), folder


def test_a_run_uploads_everything_and_it_loads_again(hub):
    server, seen, folder = hub
    assert seen["whole_push"] == {"same weights": True, "same class": True, "same processor": True}
    first_commit = server.repositories["me/run"][1]
    assert set(first_commit) == PUBLISHED | {"pictures/step-000002.png"}
    for path, content in first_commit.items():
        if path != "README.md":  # the folder's was written anew for other repositories
            assert content == (folder / "run" / path).read_bytes(), path


def test_the_plain_encoder_loads_from_the_hub_without_hf_masked(hub):
    server, _, folder = hub
    (folder / "plain.py").write_text(PLAIN)
    output = subprocess.run(
        [sys.executable, "plain.py", "weights.pt"], cwd=folder, env=server.environment(folder / "other home"),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = json.loads(output.strip().splitlines()[-1])
    assert found == {"encoder": "transformers.models.vit.modeling_vit", "size": {"shortest_edge": 8}}
    ours = AutoModelForPreTraining.from_pretrained(folder / "run").backbone.state_dict()
    plain = torch.load(folder / "weights.pt")
    assert plain.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(plain[name], value), name


def test_the_card_says_what_was_run_and_measured(hub):
    server, _, folder = hub
    content = server.repositories["me/run"][1]["README.md"].decode()
    assert faults_of_card(content) == []
    card = ModelCard(content)
    run = json.loads((folder / "run" / "run.json").read_text())
    results = {result.metric_name.split(" while")[0]: result for result in card.data.eval_results}
    assert results["kNN accuracy"].metric_value == run["measured"]["knn_accuracy"]
    assert results["linear probe accuracy"].metric_value == run["measured"]["linear_accuracy"]
    assert all(result.dataset_name == "scikit-learn's digits" for result in results.values())
    assert 'from_pretrained("me/run", subfolder="encoder")' in content
    for words in ("2 steps of 16", "loss reconstruction", "mask_ratio: 0.75", f"torch {torch.__version__}"):
        assert words in content, words
    for link in ("pictures/step-000002.png", "pictures/loss.png"):
        assert f"({link})" in content and link in server.repositories["me/run"][1]


def test_a_push_that_fails_at_any_request_can_be_made_again(hub):
    _, seen, folder = hub
    found = seen["pushes_that_fail"]
    kinds = ("repos/create", "validate-yaml", "preupload", "objects/batch", "/storage/", "verify", "/commit/")
    assert all(any(kind in request for request in found["requests"]) for kind in kinds), found["requests"]
    assert len(found["attempts"]) == 3 * len(found["requests"]) >= 30
    for attempt in found["attempts"]:
        assert attempt["status"] == 2 and attempt["kept"], attempt
        assert f"`hf-masked push {folder / 'run'} {attempt['repo']}`" in attempt["line"], attempt
        # All or nothing: a commit of which only the answer was lost stands.
        assert attempt["there"] in (None, [], found["files"]), attempt
        assert attempt["again"] == 0 and attempt["in the end"] == found["files"], attempt
    assert any(attempt["there"] == found["files"] for attempt in found["attempts"])


def test_a_run_whose_push_fails_keeps_everything_and_says_how_to_push(hub):
    _, seen, folder = hub
    found = seen["run_whose_push_fails"]
    assert found["status"] == 2 and found["line"].startswith("train.py: The push to me/broken failed"), found
    assert f"`hf-masked push {folder / 'broken'} me/broken`" in found["line"]
    assert set(found["kept"]) | {"README.md"} == PUBLISHED | {"training_args.bin"}
    assert set(found["in the end"]) == PUBLISHED


def test_checkpoints_are_pushed_while_training_goes_on(hub):
    server, seen, _ = hub
    found = seen["pushes_while_training"]
    assert set(found["every_save"]) == PUBLISHED
    assert any("A push of a checkpoint failed" in warning for warning in found["warnings"])
    assert found["commits of every_save"] == 2  # the second checkpoint's and the last one
    beside = {path.removeprefix("last-checkpoint/") for path in found["checkpoint"]} - PUBLISHED
    assert {"optimizer.pt", "scheduler.pt"} <= beside
    assert not any("/" not in path and path.endswith((".pt", ".bin")) for path in found["checkpoint"])
    assert found["token"] is None, "the token was pickled, and published, with the arguments"
    assert not any(b"hf_writer" in content for content in server.files("me/checkpoint").values())


def test_missing_rights_are_found_before_training(hub):
    _, seen, _ = hub
    for name, found in seen["without_rights"].items():
        assert found["status"] == 2 and not found["trained"], (name, found)
        assert found["line"].startswith("train.py: ") and "cannot be written on the Hub" in found["line"]
        for line in (found["line"], found["push"]["line"]):
            assert "`hf auth login`" in line, (name, line)
    assert "401" in seen["without_rights"]["no token"]["line"]
    assert all("403" in seen["without_rights"][name]["line"] for name in ("other owner", "read only"))


def test_a_model_pushes_itself(hub):
    server, seen, _ = hub
    found = seen["model_push"]
    assert found["same weights"] and found["same processor"]
    assert set(found["files"]) == {path for path in PUBLISHED if "/" not in path or "encoder" in path} - {
        "run.json", "trainer_state.json",
    }  # fmt: skip
    card = ModelCard(server.files("me/model")["README.md"].decode())
    assert "from-python" in card.data.tags and card.data.license == "apache-2.0" and not card.data.eval_results
    assert "failed" in found["line"] and "push_to_hub again" in found["line"]
    # A card that is there already is not replaced by one that knows less.
    assert ModelCard(server.files("me/run")["README.md"].decode()).data.eval_results


def test_models_of_other_packages_are_pushed_as_the_trainer_does_it(hub):
    server, seen, _ = hub
    files = seen["trainer_of_another_packages_model"]["files"]
    assert {"README.md", "model.safetensors", "config.json"} <= set(files) and "encoder/config.json" not in files
    assert "stock" in ModelCard(server.files("me/stock")["README.md"].decode()).data.tags
