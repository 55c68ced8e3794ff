"""Texts from files, folders and tables; blocks; the training program on them."""

import json

import pytest
import torch

from hf_masked import TextProcessor
from hf_masked.data.text import TextBlocks, TextDataset, load_texts
from hf_masked.training.cli import main


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "wiki_train.txt").write_text("One line.\n\n   \nAnother line.\nThe third line.\n")
    (tmp_path / "texts" / "wiki_test.txt").write_text("A line to test.\n")
    return tmp_path / "texts"


def test_lines_of_a_file_are_texts_and_empty_ones_are_left_out(folder):
    source = load_texts(str(folder / "wiki_train.txt"))
    assert [source.sample(number) for number in range(len(source))] == [
        "One line.",
        "Another line.",
        "The third line.",
    ]
    assert source.labels() is None


def test_names_of_files_are_splits(folder):
    assert len(load_texts(str(folder), "train")) == 3
    assert load_texts(str(folder), "test").sample(0) == load_texts(str(folder), "wiki_test").sample(0)
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_texts(str(folder), "validation")


def test_class_folders_hold_one_text_per_file(tmp_path):
    for name in ("train/good/1.txt", "train/bad/2.txt", "test/good/3.txt", "test/bad/4.txt"):
        path = tmp_path / "reviews" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\nhas two lines")
    source = load_texts(str(tmp_path / "reviews"), "train")
    assert source.class_names == ["bad", "good"] and source.labels().tolist() == [0, 1]
    assert source.sample(1) == "train/good/1.txt\nhas two lines"


def test_tables_have_columns_of_texts_and_labels(tmp_path):
    rows = [{"premise": f"p{n}", "other": f"o{n}", "label": n % 2} for n in range(4)] + [{"premise": "", "other": "x"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="several could hold them"):
        load_texts(str(path))
    pairs = load_texts(str(path), text_column="premise,other")
    assert pairs.texts_per_row == 2 and pairs.sample(1) == ["p1", "o1"] and pairs.labels().tolist() == [0, 1, 0, 1]
    assert load_texts(str(path), text_column="other", label_column="label").labels()[-1] == -1
    with pytest.raises(ValueError, match="text_column='label' is no column of texts"):
        load_texts(str(path), text_column="label")


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "no folder or file"), ("empty", "holds no texts"), ("odd.bin", "files of .bin")],
)
def test_what_is_no_text_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=message):
        load_texts(name)


def test_blocks_are_cut_from_all_texts_one_after_the_other(folder):
    processor = TextProcessor(max_length=8)
    blocks = TextBlocks(load_texts(str(folder)), processor)
    ids = torch.cat([blocks.sample(number)[1:-1] for number in range(len(blocks))])
    assert all(len(blocks.sample(n)) == 8 and blocks.sample(n)[0] == 2 and blocks.sample(n)[-1] == 3 for n in range(6))
    whole = "One line.[SEP]Another line.[SEP]The third line.[SEP]"
    assert whole.startswith(processor.tokenizer.decode(ids)) and len(ids) == 36
    with pytest.raises(ValueError, match="fill no block"):
        TextBlocks(load_texts(str(folder), "test"), TextProcessor(max_length=100))


def test_a_batch_does_not_depend_on_its_order(folder):
    data = TextDataset(TextBlocks(load_texts(str(folder)), processor := TextProcessor(max_length=8)), processor)
    there, back = data.__getitems__([(0, 1), (0, 4)]), data.__getitems__([(0, 4), (0, 1)])
    assert torch.equal(there["tokens"]["input_ids"], back["tokens"]["input_ids"].flip(0))
    assert there["indices"].tolist() == [1, 4] and there["bad"] == [] and data.name(1).startswith("text 1 of")


BERT = {
    "vocab_size": 261,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "method", ["mae_lm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simclr", "byol", "triplet"))]
)
def test_training_program_takes_texts(method, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {n} of class {n % 2}, and more of it", "label": n % 2} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {"mae_lm": ["--model.mask_token_id", "4"]}.get(method, [])
    trainer = main(
        [
            *("--method", method, "--dataset_name", str(path), "--test_split", "train", "--use_cpu", "true"),
            *("--model.backbone_config", json.dumps({"model_type": "bert", **BERT}), *settings),
            *("--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no"),
            *("--probe_every_epochs", "1", "--report_to", "none", "--disable_tqdm", "true"),
            *("--output_dir", str(tmp_path / "out")),
        ]
    )
    assert trainer.state.global_step == 2
    assert any("knn_accuracy" in line for line in trainer.state.log_history)
    encoder = tmp_path / "out" / "encoder"
    assert {path.name for path in encoder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert "AutoTokenizer.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
