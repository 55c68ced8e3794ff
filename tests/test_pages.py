"""README, cards and docs: their code runs, their tables are fresh, their links lead somewhere."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import filled, pages
from hf_masked.modeling.registry import CATALOGUE, load_later_families

ROOT = Path(__file__).parents[1]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINKS = re.compile(r"\]\((?!https?:)([^)#]+)\)")

DIGITS = [
    *("--config", str(ROOT / "recipes" / "mae_fashion_mnist.yaml"), "--dataset_name", "digits"),
    *("--model.backbone_config.image_size", "8", "--processor.size", "8", "--max_steps", "1", "--save_strategy", "no"),
    *("--model.backbone_config.num_hidden_layers", "1", "--probe_every_epochs", "0", "--picture_every_epochs", "0"),
    *("--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--output_dir", "runs/digits"),
]

BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in pages()
    for number, block in enumerate(PYTHON.findall(page.read_text()))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "after a run in runs/digits" in block:
        from hf_masked.training.cli import main

        main(DIGITS)
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    assert filled(page.read_text()) == page.read_text(), "run `python benchmarks/tables.py`"


def test_feeding_is_as_fast_as_promised():
    ways = json.loads((ROOT / "benchmarks" / "results" / "feeding_cpu.json").read_text())["ways"]
    assert ways["ours"]["times_transformers"] >= 1.5
    assert ways["ours, cached"]["times_plain"] >= 2.5


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert built.returncode == 0, built.stderr[-3000:]
    load_later_families()
    for name, variant in CATALOGUE.items():
        assert name in (tmp_path / "site" / "methods" / variant.family / "index.html").read_text()
        assert variant.config.paper_title in html.unescape(
            (tmp_path / "site" / "cards" / name / "index.html").read_text()
        )


@pytest.mark.parametrize("page", [*pages(), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    for link in LINKS.findall(page.read_text()):
        assert (page.parent / link).exists(), link
