"""SGC against the reference's values and against its paper."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch_geometric.nn import SGConv

from hf_masked import GraphProcessor, SGCConfig, SGCFilter, SGCFilterConfig, SGCForNodeClassification, SGCModel
from hf_masked.modeling.masked_graph.sgc import convert_official_weights, official_config
from hf_masked.modeling.parts import graph as graph_parts
from hf_masked.modeling.parts.graph import normalized_edges, propagate
from hf_masked.training.cli import train
from hf_masked.training.recipes import parse
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "sgc.json").read_text())


def tiny_graph(nodes: int = 9, features: int = 5, loops: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """A ring with chords; the last node has no neighbour."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(nodes - 1)
    edges = torch.cat([torch.stack([places, (places + step) % (nodes - 1)]) for step in (1, 3)], dim=1)
    edges = torch.cat([edges, edges.flip(0), torch.tensor([loops, loops], dtype=torch.long)], dim=1)
    return {"x": torch.randn(nodes, features, generator=generator), "edge_index": edges}


def filter_of(num_hops: int = 2, features: int = 5, **settings) -> SGCFilter:
    return SGCFilter(SGCFilterConfig(num_features=features, num_hops=num_hops, **settings))


def dense_filter(edge_index: torch.Tensor, nodes: int, self_loops: str = "add") -> torch.Tensor:
    """S (nodes, nodes) of a graph."""
    edges, weight = normalized_edges(edge_index, nodes, self_loops=self_loops)
    return torch.zeros(nodes, nodes).index_put((edges[1], edges[0]), weight, accumulate=True)


# --- the reference ---


@pytest.mark.parametrize("name", ["plain", "loops"])
def test_values_are_the_references(name):
    run, nodes = PARITY[name], 12
    x = filled_pixels((nodes, 9), f"{name}.x") + 2
    x[7] = 0
    graph = {"x": x, "edge_index": torch.tensor(run["edge_index"])}
    inputs = GraphProcessor(feature_scaling="rows", keep_self_loops=True)(graph)
    weights = filled(run["parameters"])
    config = official_config(weights)
    config.backbone_config.num_hops = run["hops"]
    model = SGCForNodeClassification(config)
    model.load_state_dict(convert_official_weights(weights, config))
    filtered = model.backbone(**inputs).last_hidden_state
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(filtered, torch.tensor(run["filtered"]), **close)
    torch.testing.assert_close(model(**inputs).logits, torch.tensor(run["logits"]), **close)
    train, labels = torch.arange(0, nodes, 2), torch.arange(nodes) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2, weight_decay=1e-2)
    for step, expected in enumerate(run["losses"]):
        loss = model(propagated_x=filtered[train], labels=labels[train]).loss
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for theirs, norm in run["gradient_norms"].items():
                parameter = getattr(model.classifier, theirs.removeprefix("W."))
                assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-5)
        optimizer.step()


@pytest.mark.parametrize(("features", "classes", "count"), [(1433, 7, 10_038), (3703, 6, 22_224)])
def test_parameters_are_the_papers(features, classes, count):
    config = SGCConfig(backbone_config=SGCFilterConfig(num_features=features), num_labels=classes)
    assert sum(parameter.numel() for parameter in SGCForNodeClassification(config).parameters()) == count


# --- the filter ---


def test_spectrum():
    edges = tiny_graph()["edge_index"]
    matrix = dense_filter(edges, 9).double()
    torch.testing.assert_close(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] > -1 and values[-1].item() == pytest.approx(1)
    root = (edges[1].bincount(minlength=9) + 1).double().sqrt()
    torch.testing.assert_close(matrix[:8, :8] @ root[:8], root[:8], rtol=1e-6, atol=1e-6)
    # The ring with chords has two sides: without self-loops the smallest eigenvalue is -1 (theorem 1).
    assert torch.linalg.eigvalsh(dense_filter(edges, 9, "none"))[0].item() == pytest.approx(-1, abs=1e-5)


def test_hops_are_powers_of_the_dense_filter():
    graph = tiny_graph()
    matrix = dense_filter(graph["edge_index"], 9)
    for hops in (0, 1, 2, 5):
        expected = torch.linalg.matrix_power(matrix, hops) @ graph["x"]
        torch.testing.assert_close(filter_of(hops)(**graph).last_hidden_state, expected, rtol=1e-6, atol=1e-6)
    once = filter_of(1)
    state = once(**graph).last_hidden_state
    twice = once(state, graph["edge_index"]).last_hidden_state
    assert torch.equal(filter_of(2)(**graph).last_hidden_state, twice)
    assert torch.equal(filter_of(0)(**graph).last_hidden_state, graph["x"])


def test_wide_features_go_in_parts(monkeypatch):
    graph = tiny_graph()
    whole = filter_of()(**graph).last_hidden_state
    monkeypatch.setattr(graph_parts, "_MESSAGES", 100)
    assert torch.equal(filter_of()(**graph).last_hidden_state, whole)


@pytest.mark.parametrize("loops", [(), (0, 4)])
def test_torch_geometrics_convolution(loops):
    graph = tiny_graph(loops=loops)
    theirs = SGConv(5, 3, K=2)
    config = SGCConfig(backbone_config=SGCFilterConfig(num_features=5), num_labels=3)
    model = SGCForNodeClassification(config)
    model.classifier.load_state_dict(theirs.lin.state_dict())
    expected = theirs(**graph)
    assert torch.allclose(model(**graph).logits, expected, atol=1e-5) is (not loops)
    model.backbone.config.self_loops = "keep"
    torch.testing.assert_close(model(**graph).logits, expected, rtol=1e-5, atol=1e-5)


def test_lonely_nodes_keep_their_features_and_pairs_share_theirs():
    graph = tiny_graph()
    assert torch.equal(filter_of(4)(**graph).last_hidden_state[8], graph["x"][8])
    pair = torch.tensor([[0, 1], [1, 0]])
    x = torch.randn(2, 5)
    torch.testing.assert_close(filter_of(1)(x, pair).last_hidden_state, x.mean(dim=0).expand(2, 5))


def test_weights_of_edges_count():
    graph = tiny_graph()
    edges = graph["edge_index"]
    twice = torch.cat([edges, edges], dim=1)
    weighted = filter_of()(**graph, edge_weight=torch.full((edges.shape[1],), 2.0)).last_hidden_state
    torch.testing.assert_close(filter_of()(graph["x"], twice).last_hidden_state, weighted)
    # The processor merges edges that are given twice.
    inputs = GraphProcessor()({"x": graph["x"], "edge_index": twice})
    torch.testing.assert_close(filter_of()(**inputs), filter_of()(**graph))


def test_gradient_of_the_features_is_the_transposed_filters():
    graph = tiny_graph()
    x = graph["x"].requires_grad_()
    upstream = torch.randn(9, 5)
    filter_of(3)(x, graph["edge_index"]).last_hidden_state.backward(upstream)
    matrix = torch.linalg.matrix_power(dense_filter(graph["edge_index"], 9), 3)
    torch.testing.assert_close(x.grad, matrix.T @ upstream, rtol=1e-5, atol=1e-6)


def test_many_hops_leave_only_the_degrees():
    graph = tiny_graph()
    edges, weight = normalized_edges(graph["edge_index"], 9)
    states = propagate(graph["x"].abs(), edges, weight, 200)[:8]
    root = (graph["edge_index"][1].bincount(minlength=9)[:8] + 1).float().sqrt()
    similarity = F.cosine_similarity(states.T, root.expand(5, 8))
    torch.testing.assert_close(similarity, torch.ones(5), rtol=1e-4, atol=1e-4)


# --- the classifier ---


def small_model(num_hops: int = 2) -> SGCForNodeClassification:
    torch.manual_seed(0)
    return SGCForNodeClassification(SGCConfig(backbone_config=SGCFilterConfig(num_features=5, num_hops=num_hops)))


def test_without_hops_it_is_logistic_regression():
    graph, model = tiny_graph(), small_model(0)
    torch.testing.assert_close(model(**graph).logits, model.classifier(graph["x"]))


def test_renaming_nodes_renames_their_logits():
    graph, model = tiny_graph(), small_model()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    renamed = model(x=graph["x"][order], edge_index=order.argsort()[graph["edge_index"]]).logits
    torch.testing.assert_close(renamed, model(**graph).logits[order])


def test_training_on_filtered_rows_is_training_on_the_graph():
    graph, labels = tiny_graph(), torch.arange(9) % 2
    train = torch.tensor([0, 2, 3, 5])
    masked = torch.full_like(labels, -100).index_copy(0, train, labels[train])
    models = [small_model(), small_model()]
    rows = models[0].backbone(**graph).last_hidden_state[train]
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.2, weight_decay=1e-3) for model in models]
    for _ in range(4):
        outputs = [models[0](propagated_x=rows, labels=labels[train]), models[1](**graph, labels=masked)]
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
        torch.testing.assert_close(outputs[0].accuracy, outputs[1].accuracy)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()


def test_a_model_without_parameters_is_saved_and_loaded(tmp_path):
    model = SGCModel(SGCConfig(backbone_config=SGCFilterConfig(num_features=5, num_hops=3)))
    assert not list(model.parameters()) and model.dtype == torch.float32
    model.save_pretrained(tmp_path / "model")
    model.backbone.save_pretrained(tmp_path / "filter")
    graph = tiny_graph()
    expected = model(**graph).last_hidden_state
    for loaded in (SGCModel.from_pretrained(tmp_path / "model"), SGCFilter.from_pretrained(tmp_path / "filter")):
        assert torch.equal(loaded(**graph).last_hidden_state, expected)


def test_inputs_and_settings_that_do_not_fit_are_named():
    graph, model = tiny_graph(), small_model()
    for inputs in ({}, {"x": graph["x"]}, {**graph, "propagated_x": graph["x"]}):
        with pytest.raises(ValueError, match="either `propagated_x` or a graph"):
            model(**inputs)
    with pytest.raises(ValueError, match=r"\(9, 3\); expected \(nodes, 5\)"):
        model(propagated_x=graph["x"][:, :3])
    with pytest.raises(ValueError, match="num_hops is -1"):
        SGCFilterConfig(num_hops=-1)
    with pytest.raises(ValueError, match="self_loops is 'twice'"):
        SGCFilterConfig(self_loops="twice")


# --- it learns ---


def accuracy(graph: dict[str, torch.Tensor], labels: torch.Tensor, train: torch.Tensor, num_hops: int) -> float:
    """On the nodes that are not for training, after the reference's training."""
    torch.manual_seed(0)
    features = graph["x"].shape[1]
    backbone_config = SGCFilterConfig(num_features=features, num_hops=num_hops)
    model = SGCForNodeClassification(SGCConfig(backbone_config=backbone_config, num_labels=int(labels.max()) + 1))
    rows = model.backbone(**graph).last_hidden_state
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2, weight_decay=5e-6)
    for _ in range(100):
        loss = model(propagated_x=rows[train], labels=labels[train]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill(0, train, False)
    return model(propagated_x=rows[rest], labels=labels[rest]).accuracy.item()


def test_neighbours_of_digits_help_five_labels_of_each_class():
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    digits = load_digits()
    edges = torch.from_numpy(np.stack(kneighbors_graph(digits.data, 8).nonzero())).long()
    processor = GraphProcessor(feature_scaling="columns")
    graph = processor.prepare({"x": torch.from_numpy(digits.data), "edge_index": edges})
    labels = torch.from_numpy(digits.target)
    train = torch.cat([(labels == digit).nonzero()[:5, 0] for digit in range(10)])
    assert accuracy(graph, labels, train, num_hops=2) > accuracy(graph, labels, train, num_hops=0) + 0.04


CITATIONS = Path(__file__).parents[4] / "shared" / "data" / "graphs"


@pytest.mark.slow
@pytest.mark.skipif(not CITATIONS.is_dir(), reason="needs the citation graphs in ../shared/data/graphs")
@pytest.mark.parametrize(("name", "least", "most"), [("cora", 0.805, 0.815), ("citeseer", 0.714, 0.724)])
def test_accuracy_on_citations_is_the_papers(name, least, most, tmp_path):
    recipe = Path(__file__).parents[3] / "recipes" / f"sgc_{name}.yaml"
    run = ["--dataset_name", str(CITATIONS / f"{name}.npz"), "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    history = train(*parse(["--config", str(recipe), *run])).state.log_history
    assert least <= [line["test_accuracy"] for line in history if "test_accuracy" in line][-1] <= most
