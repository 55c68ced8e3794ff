"""Every variant goes to the Hub and comes back: one loopback server and one client process for all of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.conformance.cases import MODELS
from tests.hub_server import faults_of_card, hub_server

ROOT = Path(__file__).parents[2]
LINKS = re.compile(r"\]\((?!https?:|#)([^)]+)\)")

CLIENT = """
import json, sys, torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
from tests.conformance.cases import MODELS, processor_of, saved_processor, tiny_model

def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())

seen = {}
for variant in MODELS:
    model, repo = tiny_model(variant), f"me/{variant.name}"
    processor = processor_of(variant, model.config)
    model.push_to_hub(repo, processor=processor)
    loaded = AutoModelForPreTraining.from_pretrained(repo)
    encoder, report = AutoModel.from_pretrained(repo, subfolder="encoder", output_loading_info=True)
    missing = {name for name in report["missing_keys"] if "pooler" not in name}
    seen[variant.name] = {
        "class": type(loaded) is variant.pretraining,
        "weights": same(model, loaded),
        "processor": saved_processor(variant, repo).to_dict() == processor.to_dict(),
        "encoder": type(encoder) is type(model.plain_backbone()) and not missing and not report["unexpected_keys"],
    }
    if variant.config.modality == "image":
        plain = AutoImageProcessor.from_pretrained(repo, subfolder="encoder")
        seen[variant.name]["plain processor"] = "hf_masked" not in type(plain).__module__
json.dump(seen, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The server with all variants on it, and what the client saw."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "client.py").write_text(CLIENT)
    with hub_server() as server:
        environment = server.environment(folder / "home") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(folder / "client.py"), str(folder / "seen.json")]
        client = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert client.returncode == 0, client.stderr[-5000:]
        yield server, json.loads((folder / "seen.json").read_text())


@pytest.mark.xdist_group("hub catalogue")
def test_variant_is_pushed_and_comes_back(variant, pushed):
    server, seen = pushed
    assert all(seen[variant.name].values()), seen[variant.name]
    assert len(seen) == len(MODELS)
    files = server.files(f"me/{variant.name}")
    assert {"README.md", "config.json", "preprocessor_config.json", "encoder/config.json"} <= set(files)
    assert not any(path.endswith((".bin", ".pt", ".pth")) for path in files)


@pytest.mark.xdist_group("hub catalogue")
def test_its_card_is_made_from_the_methods_page(variant, pushed):
    server, _ = pushed
    files = server.files(f"me/{variant.name}")
    content = files["README.md"].decode()
    assert faults_of_card(content) == []
    card, page = ModelCard(content), ModelCard.load(ROOT / "model_cards" / f"{variant.name}.md")
    assert set(page.data.tags) <= set(card.data.tags) and card.data.library_name == "hf_masked"
    _, _, text = page.text.strip().partition("\n")
    assert text.strip() in card.text and f'from_pretrained("me/{variant.name}", subfolder="encoder")' in card.text
    for link in LINKS.findall(card.text):
        assert link in files, f"the link to {link} leads nowhere on the Hub: give it in full"
