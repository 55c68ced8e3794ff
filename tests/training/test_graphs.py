"""The training program on graphs."""

import logging

import numpy as np
import pytest
import torch

from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.cli import main, train
from hf_masked.training.recipes import parse
from tests.data.test_graphs import ring

BANDANA = [
    *("--method", "bandana", "--model.backbone_config.model_type", "hf_masked_bandana_encoder"),
    *("--model.backbone_config.num_features", "3", "--model.backbone_config.hidden_size", "8"),
    *("--model.decoder_hidden_size", "4", "--per_device_train_batch_size", "1"),
]
SGC = [
    *("--method", "sgc", "--model.backbone_config.model_type", "hf_masked_sgc_filter"),
    *("--model.backbone_config.num_features", "3", "--per_device_train_batch_size", "10"),
]
SHORT = [
    *("--max_steps", "4", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"),
    *("--probe_every_epochs", "2", "--picture_every_epochs", "0", "--logging_steps", "2"),
]


@pytest.fixture
def file(tmp_path) -> str:
    """A ring of 60 nodes, half of whose classes are for training."""
    graph = ring(60)
    arrays = {"x": graph.x.numpy(), "edge_index": graph.edge_index.numpy(), "y": graph.y.numpy()}
    nodes = {"train": np.arange(30), "val": np.arange(30, 40), "test": np.arange(40, 60)}
    np.savez(tmp_path / "ring.npz", **arrays, **nodes)
    return str(tmp_path / "ring.npz")


def run(flags: list[str], file: str, tmp_path):
    flags = [*flags, *SHORT, "--dataset_name", file, "--output_dir", str(tmp_path / "run")]
    return train(*parse(flags)), tmp_path / "run"


def lines(trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def test_bandana_is_judged_by_links_and_nodes_while_it_trains(file, tmp_path):
    trainer, output = run([*BANDANA, "--held_out_edges", "0.1", "0.2"], file, tmp_path)
    for name in ("validation_link_auc", "test_link_auc", "test_link_ap", "knn_accuracy", "effective_rank"):
        assert len(lines(trainer, name)) == 2, name
    edges = trainer.train_dataset.__getitems__([(0, 0)])["graph"]["edge_index"]
    assert edges.shape == (2, 2 * 42)  # of 60
    assert (output / "encoder" / "model.safetensors").exists() and (output / "preprocessor_config.json").exists()


def test_sgc_is_judged_by_the_other_splits(file, tmp_path):
    trainer, _ = run(SGC, file, tmp_path)
    assert len(trainer.train_dataset) == 30 and not lines(trainer, "knn_accuracy")
    # Three steps of ten rows make an epoch of the four steps.
    assert len(lines(trainer, "validation_accuracy")) == len(lines(trainer, "test_accuracy")) == 1
    assert len(lines(trainer, "accuracy")) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*BANDANA, "--per_device_train_batch_size", "2"], "in one process, with a batch of 1"),
        ([*BANDANA, "--model.backbone_config.num_features", "4"], "--model.backbone_config.num_features 3"),
        ([*BANDANA, "--train_split", "unsupervised"], "no split 'unsupervised'"),
        ([*BANDANA, "--streaming"], "leave out --streaming"),
        ([*SGC, "--model.num_labels", "1"], "set --model.num_labels 2"),
    ],
)
def test_mistakes_end_the_program_with_one_line(flags, message, file, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*flags, *SHORT, "--dataset_name", file, "--output_dir", str(tmp_path / "run")])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: ") and message in error


def test_a_graph_with_few_labels_has_no_probe_of_neighbours(tmp_path, caplog):
    flags = [*BANDANA, "--model.backbone_config.num_features", "34", "--held_out_edges", "0", "0.1"]
    with caplog.at_level(logging.WARNING):
        trainer, _ = run(flags, "karate_club", tmp_path)
    assert not lines(trainer, "knn_accuracy") and not lines(trainer, "validation_link_auc")
    assert len(lines(trainer, "test_link_auc")) == 2


def test_coupled_weight_decay_is_adams(file, tmp_path):
    flags = ["--coupled_weight_decay", "true", "--optim", "adamw_torch", "--weight_decay", "0.3"]
    trainer, _ = run([*SGC, *flags, "--learning_rate", "0.1", "--lr_scheduler_type", "constant"], file, tmp_path)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.Adam
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}  # the bias too, as the method asks
    with pytest.raises(ValueError, match="set optim=adamw_torch"):
        PreTrainingArguments(output_dir=str(tmp_path), coupled_weight_decay=True, optim="sgd")
