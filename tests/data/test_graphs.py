"""Graphs from files and from torch-geometric, their link splits, their processor, and the data sets of training."""

import sys

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from hf_masked import GraphProcessor
from hf_masked.data.graphs import (
    Graph,
    GraphDataset,
    NodeDataset,
    collate_graphs,
    from_data,
    labelled_nodes,
    load_graph,
    split_links,
)
from hf_masked.evaluation.graphs import link_prediction, node_probe
from hf_masked.modeling.registry import get_variant
from hf_masked.training.cli import main


def ring(nodes: int = 40, features: int = 3) -> Graph:
    """A ring, its edges given in one direction."""
    places = torch.arange(nodes)
    edges = torch.stack([places, places.roll(-1)])
    x = torch.rand(nodes, features, generator=torch.Generator().manual_seed(0))
    return Graph(x, edges, places % 2, {"train": places[:10], "test": places[20:]}, "ring")


def as_set(edges: torch.Tensor) -> set[tuple[int, int]]:
    return {tuple(sorted(pair)) for pair in edges.T.tolist()}


# --- where graphs come from ---


def test_files_hold_features_as_they_are_or_sparse(tmp_path):
    graph = ring()
    x = graph.x.clone()
    x[:, 1] = 0
    shared = {
        "edge_index": graph.edge_index.numpy(),
        "y": graph.y.numpy(),
        "train": np.arange(10),
        "val": np.arange(3),
    }
    np.savez(tmp_path / "dense.npz", x=x.numpy(), **shared)
    sparse = {
        "x_indptr": 2 * np.arange(41, dtype=np.int32),
        "x_indices": np.tile([0, 2], 40),
        "x_values": x[:, [0, 2]].flatten().numpy(),
        "x_shape": np.array([40, 3]),
    }
    np.savez(tmp_path / "sparse.npz", **sparse, **shared)
    for name in ("dense", "sparse"):
        loaded = load_graph(str(tmp_path / f"{name}.npz"))
        assert torch.equal(loaded.x, x) and torch.equal(loaded.edge_index, graph.edge_index)
        assert torch.equal(loaded.y, graph.y) and set(loaded.nodes) == {"train", "validation"}


def test_graphs_of_torch_geometric():
    club = load_graph("karate_club")
    assert club.x.shape == (34, 34) and club.edge_index.shape == (2, 156) and len(club.nodes["train"]) == 4
    assert len(club.nodes["test"]) == 30 and club.train_mask.sum() == 4
    plain = from_data(Data(x=torch.ones(2, 3), edge_index=torch.tensor([[0], [1]])), "pair")
    assert plain.y is None and plain.train_mask is None and labelled_nodes(plain, "train") is None


def test_what_is_no_graph_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no graph 'photo'.*karate_club"):
        load_graph("photo")
    with pytest.raises(ValueError, match=r"no file .*missing\.npz"):
        load_graph(str(tmp_path / "missing.npz"))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="has the arrays images"):
        load_graph(str(tmp_path / "other.npz"))
    np.savez(tmp_path / "beyond.npz", x=np.zeros((2, 3)), edge_index=np.array([[0], [2]]))
    with pytest.raises(ValueError, match=r"features of shape \(2, 3\)"):
        load_graph(str(tmp_path / "beyond.npz"))


@pytest.fixture
def without_torch_geometric(monkeypatch):
    """As where it is not installed."""

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "torch_geometric":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_geometric"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])


def test_without_torch_geometric_one_line_says_what_to_install(without_torch_geometric, tmp_path, capsys):
    bandana, sgc = get_variant("bandana"), get_variant("sgc")
    remedy = r"^This needs torch-geometric.*pip install 'hf-masked\[graph\]'"
    for needs in (lambda: bandana.model(bandana.tiny_config()), lambda: load_graph("karate_club")):
        with pytest.raises(ImportError, match=remedy):
            needs()
    with pytest.raises(SystemExit) as end:
        main(["--method", "bandana", "--dataset_name", "karate_club", "--output_dir", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("train.py: This needs torch-geometric")
    model = sgc.pretraining(sgc.tiny_config())
    assert model(**sgc.inputs(model.config, 2)).loss.isfinite()


# --- links ---


def test_links_are_held_out_with_both_directions():
    graph = ring()
    split = split_links(graph, (0.1, 0.2))
    parts = {"train": as_set(split.graph.edge_index), **{part: as_set(e) for part, e in split.positive.items()}}
    assert {part: len(pairs) for part, pairs in parts.items()} == {"train": 28, "validation": 4, "test": 8}
    assert set.union(*parts.values()) == as_set(graph.edge_index)
    assert split.graph.edge_index.shape == (2, 56)
    for part, pairs in split.negative.items():
        assert pairs.shape == split.positive[part].shape
        assert not as_set(pairs) & as_set(graph.edge_index) and (pairs[0] != pairs[1]).all()


def test_a_split_is_a_function_of_its_seed_whatever_the_order_of_the_edges():
    graph = ring()
    mixed = Graph(graph.x, torch.cat([graph.edge_index.flip(0), graph.edge_index], dim=1), None, {}, "mixed")
    first, again, other = split_links(graph), split_links(mixed), split_links(graph, seed=1)
    for part in ("validation", "test"):
        assert torch.equal(first.positive[part], again.positive[part])
        assert torch.equal(first.negative[part], again.negative[part])
    assert not torch.equal(first.positive["test"], other.positive["test"])


@pytest.mark.parametrize("held_out", [(0.5, 0.5), (-0.1, 0.1)])
def test_shares_that_leave_nothing_are_refused(held_out):
    with pytest.raises(ValueError, match="held_out is"):
        split_links(ring(), held_out)


class Oracle(torch.nn.Module):
    """Knows the ring."""

    device = torch.device("cpu")

    def link_scores(self, x, edge_index, edge_label_index):
        step = (edge_label_index[0] - edge_label_index[1]).abs()
        return ((step == 1) | (step == len(x) - 1)).float()


def test_links_are_judged_over_edges_and_other_pairs():
    processor, split = GraphProcessor(), split_links(ring(), (0.1, 0.2))
    assert link_prediction(Oracle(), processor, split) == {"link_auc": 1.0, "link_ap": 1.0}
    split.positive, split.negative = split.negative, split.positive
    assert link_prediction(Oracle(), processor, split, "validation")["link_auc"] == 0.0


def test_probe_reads_separable_features_and_takes_the_best_validation():
    generator = torch.Generator().manual_seed(0)
    labels = {part: torch.arange(40) % 2 for part in ("train", "validation", "test")}
    features = {
        part: classes[:, None] + 0.1 * torch.randn(40, 4, generator=generator) for part, classes in labels.items()
    }
    assert node_probe(features, labels) == {"validation_accuracy": 1.0, "test_accuracy": 1.0}
    labels["test"] = 1 - labels["test"]
    assert node_probe(features, labels)["test_accuracy"] == 0.0


# --- the processor ---


def test_edges_are_put_in_order():
    messy = {"x": torch.ones(4, 2), "edge_index": torch.tensor([[2, 0, 1, 1, 3], [0, 2, 2, 1, 3]])}
    edges = GraphProcessor()(messy)["edge_index"]
    assert edges.tolist() == [[2, 2, 0, 1], [0, 1, 2, 2]]
    kept = GraphProcessor(keep_self_loops=True)(messy)["edge_index"]
    assert kept.tolist() == [[2, 1, 2, 0, 1, 3], [0, 1, 1, 2, 2, 3]]


def test_features_are_scaled():
    graph = {"x": torch.tensor([[1.0, 3.0], [0.0, 0.0], [5.0, 5.0]]), "edge_index": torch.zeros(2, 0)}
    rows = GraphProcessor(feature_scaling="rows")(graph)["x"]
    torch.testing.assert_close(rows, torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]))
    columns = GraphProcessor(feature_scaling="columns")(graph)["x"]
    torch.testing.assert_close(columns.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(columns.std(dim=0), torch.ones(2))


def test_nothing_is_drawn_without_training_and_labels_are_those_of_training():
    graph, processor = ring(), GraphProcessor(temperatures=[0.9, 0.9])
    assert set(processor(graph)) == {"x", "edge_index", "labels"}
    assert torch.equal(processor(graph)["labels"], graph.y)
    inputs = processor(graph, training=True, seed=0)
    assert inputs["bandwidths"].shape == (2, 80) and inputs["neg_edge_index"].shape == (2, 80)
    assert (inputs["labels"] >= 0).sum() == 10
    again, other = (processor(graph, training=True, seed=seed) for seed in (0, 1))
    assert torch.equal(inputs["bandwidths"], again["bandwidths"])
    assert not torch.equal(inputs["bandwidths"], other["bandwidths"])


@pytest.mark.parametrize(
    ("settings", "graph", "message"),
    [
        ({"num_features": 5}, ring(), r"\(40, 3\); expected \(nodes, 5\).*num_features 3"),
        ({}, {"x": torch.ones(2, 3)}, "no `edge_index`"),
        ({}, {"x": torch.ones(2, 3), "edge_index": torch.tensor([[0], [2]])}, "nodes 0 to 2; the graph has 2"),
        ({}, {"x": torch.ones(2, 3), "edge_index": torch.ones(3, 2)}, r"expected \(2, edges\)"),
    ],
)
def test_graphs_that_do_not_fit_are_named(settings, graph, message):
    with pytest.raises(ValueError, match=message):
        GraphProcessor(**settings)(graph)


@pytest.mark.parametrize(
    ("settings", "message"), [({"feature_scaling": "all"}, "'all'"), ({"edges_per_step": 0}, "edges_per_step is 0")]
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GraphProcessor(**settings)


# --- the data sets ---


def inputs_of(dataset: GraphDataset, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    batch = dataset.__getitems__(keys)
    epochs = torch.tensor([epoch for epoch, _ in keys])
    return dataset.processor.finish_training(batch["graph"], batch["indices"], dataset.seed, epochs)


def test_what_is_drawn_for_a_graph_does_not_depend_on_its_batch():
    processor = GraphProcessor(temperatures=[0.9], negative_ratio=0.5)
    dataset = GraphDataset([ring(40), ring(12)], processor, seed=3)
    first, second = (inputs_of(dataset, [(2, index)]) for index in (0, 1))
    both = inputs_of(dataset, [(2, 0), (2, 1)])
    assert torch.equal(both["bandwidths"], torch.cat([first["bandwidths"], second["bandwidths"]], dim=1))
    pairs = torch.cat([first["neg_edge_index"], second["neg_edge_index"] + 40], dim=1)
    assert torch.equal(both["neg_edge_index"], pairs)
    assert both["edge_index"].shape == (2, 104) and both["x"].shape == (52, 3)
    assert not torch.equal(first["bandwidths"], inputs_of(dataset, [(3, 0)])["bandwidths"])
    assert dataset.name(1) == "ring" and not both.keys() & {"loss_edges"}


def test_large_graphs_are_learned_in_parts():
    dataset = GraphDataset([ring(40)], GraphProcessor(temperatures=[0.9], edges_per_step=30))
    assert len(dataset) == 3
    parts = [inputs_of(dataset, [(1, index)]) for index in range(3)]
    assert [len(part["loss_edges"]) for part in parts] == [30, 30, 20]
    assert torch.cat([part["loss_edges"] for part in parts]).sort().values.tolist() == list(range(80))
    assert [part["neg_edge_index"].shape[1] for part in parts] == [30, 30, 20]
    assert not torch.equal(parts[0]["loss_edges"], inputs_of(dataset, [(2, 0)])["loss_edges"])


def test_rows_of_filtered_features_pass_as_they_are():
    rows, labels = torch.randn(6, 3), torch.arange(6)
    dataset = NodeDataset(rows, labels, GraphProcessor(), "ring")
    batch = dataset.__getitems__([(0, 4), (0, 1)])
    assert torch.equal(batch["graph"]["propagated_x"], rows[[4, 1]]) and batch["targets"].tolist() == [4, 1]
    assert dataset.name(4) == "node 4 of ring" and len(dataset) == 6
    assert dataset.processor.finish_training(batch["graph"], batch["indices"], 0, 0) is batch["graph"]


def test_graphs_of_the_plain_trainer_become_one():
    processor = GraphProcessor()
    batch = collate_graphs([processor(ring(5)), processor(ring(4))])
    assert batch["x"].shape == (9, 3) and batch["labels"].tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert as_set(batch["edge_index"][:, 10:]) == {(5, 6), (6, 7), (7, 8), (5, 8)}
