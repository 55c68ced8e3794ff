"""Bandana against the reference's values and against its paper."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch_geometric.utils import softmax

from hf_masked import (
    BandanaConfig,
    BandanaEncoder,
    BandanaEncoderConfig,
    BandanaForNodeClassification,
    BandanaForPreTraining,
    BandanaModel,
)
from hf_masked.modeling.masked_graph.bandana import convert_official_weights, official_config
from hf_masked.processing.masks.bandwidth import bandwidth_mask, bandwidths_of
from hf_masked.processing.masks.non_edges import draw_non_edges
from hf_masked.randomness import given_draw, keyed_draw, torch_draw
from hf_masked.training.cli import train
from hf_masked.training.recipes import parse
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "bandana.json").read_text())
RUNS = [name for name in PARITY if name != "reference"]


def tiny_model(seed: int = 0, **settings) -> BandanaForPreTraining:
    torch.manual_seed(seed)
    backbone = BandanaEncoderConfig(num_features=6, hidden_size=8, hidden_dropout=0.0)
    config = BandanaConfig(backbone_config=backbone, decoder_hidden_size=8, decoder_dropout=0.0, **settings)
    return BandanaForPreTraining(config)


def tiny_graph(nodes: int = 10, edges: int = 14, seed: int = 0) -> dict[str, torch.Tensor]:
    """The last node has no neighbour."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.triu_indices(nodes - 1, nodes - 1, 1)[:, torch.randperm(36, generator=generator)[:edges]]
    pairs = torch.stack([low, high])
    x = torch.randn(nodes, 6, generator=generator)
    return {"x": x, "edge_index": torch.cat([pairs, pairs.flip(0)], dim=1)}


def tiny_bandwidths(graph: dict[str, torch.Tensor], layers: int = 2, temperature: float = 0.9) -> torch.Tensor:
    draw = torch_draw(1, generator=torch.Generator().manual_seed(1))
    masks = [bandwidth_mask(draw, graph["edge_index"][1], len(graph["x"]), temperature) for _ in range(layers)]
    return torch.stack(masks)


NON_EDGES = torch.tensor([[0, 9, 9, 3], [9, 1, 2, 9]])


# --- the reference ---


def reference_model(run: dict) -> tuple[BandanaForPreTraining, dict[str, torch.Tensor]]:
    """The model with the reference's weights, and its inputs."""
    weights = filled(run["parameters"])
    config = official_config(weights)
    config.backbone_config.hidden_act = run["config"]["activation"]
    config.backbone_config.hidden_dropout = config.decoder_dropout = 0.0
    settings = {"temperature": run["temperatures"], "excluded_layers": run["excluded"], "reference_edge_order": True}
    model = BandanaForPreTraining(BandanaConfig(**config.to_diff_dict() | settings))
    fitting = model.load_state_dict(convert_official_weights(weights, model.config), strict=False)
    assert not fitting.unexpected_keys and all("running" in n or "tracked" in n for n in fitting.missing_keys)
    edges = torch.tensor(run["edge_index"])
    return model, {"edge_index": edges, "neg_edge_index": torch.tensor(run["neg_edge_index"])}


def reference_inputs(name: str, run: dict, inputs: dict) -> dict[str, torch.Tensor]:
    """With features and bandwidths, whose random numbers the reference draws for its edges sorted by receiver."""
    nodes = 12
    edges = inputs["edge_index"]
    scores = filled_pixels((len(run["temperatures"]), edges.shape[1]), f"{name}.scores")
    order = (edges[1] * nodes + edges[0]).argsort()
    ours = torch.empty_like(scores)
    ours[:, order] = scores
    widths = [bandwidths_of(row, edges[1], nodes, t) for row, t in zip(ours, run["temperatures"], strict=True)]
    x = filled_pixels((nodes, run["config"]["num_features"]), f"{name}.x")
    return inputs | {"x": x, "bandwidths": torch.stack(widths)}


@pytest.mark.parametrize("name", RUNS)
def test_values_are_the_references(name):
    run = PARITY[name]
    model, inputs = reference_model(run)
    inputs = reference_inputs(name, run, inputs)
    output = model.train()(**inputs)
    output.loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(output.loss.item(), run["loss"], **close)
    torch.testing.assert_close(output.last_hidden_state, torch.tensor(run["state"]), **close)
    parts = output.losses
    layers = [i for i in range(len(run["temperatures"])) if i not in run["excluded"]]
    sums = torch.stack([parts[f"positive_{i}"] + parts[f"negative_{i}"] for i in layers])
    torch.testing.assert_close(sums, torch.tensor(run["layer_losses"]), **close)
    parameters = dict(model.named_parameters())
    largest = max(run["gradient_norms"].values())
    for theirs, norm in run["gradient_norms"].items():
        ours = next(iter(convert_official_weights({theirs: torch.zeros(1)}, model.config)))
        assert parameters[ours].grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6 * largest), theirs
    for theirs, norm in run.get("statistics", {}).items():
        ours = next(iter(convert_official_weights({theirs: torch.zeros(1)}, model.config)))
        assert dict(model.named_buffers())[ours].norm().item() == pytest.approx(norm, rel=1e-5), theirs
    model.eval()
    graph = {"x": inputs["x"], "edge_index": inputs["edge_index"]}
    torch.testing.assert_close(model.node_features(**graph), torch.tensor(run["embedding"]), **close)
    pairs = inputs["neg_edge_index"][:, : len(run["link_scores"])]
    torch.testing.assert_close(
        model.link_scores(**graph, edge_label_index=pairs), torch.tensor(run["link_scores"]), **close
    )


def test_reference_mixes_up_the_edges_unless_they_are_sorted():
    for name, same in (("reference_order", False), ("sorted", True)):
        model, inputs = reference_model(PARITY[name])
        inputs = reference_inputs(name, PARITY[name], inputs)
        theirs = model.train()(**inputs).loss
        model.config.reference_edge_order = False
        assert torch.allclose(model(**inputs).loss, theirs, rtol=1e-6) is same


def test_parameters_are_the_papers():
    with torch.device("meta"):
        model = BandanaForPreTraining(BandanaConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 208_962


# --- bandwidths ---


def test_bandwidths_are_a_softmax_over_the_edges_of_each_receiver():
    graph = tiny_graph()
    receivers = graph["edge_index"][1]
    scores = torch.randn(len(receivers), generator=torch.Generator().manual_seed(0))
    widths = bandwidths_of(scores, receivers, 10, 0.4)
    torch.testing.assert_close(widths, softmax(scores / 0.4, receivers, num_nodes=10))
    sums = torch.zeros(10).index_add(0, receivers, widths)
    has_neighbour = receivers.bincount(minlength=10) > 0
    torch.testing.assert_close(sums, has_neighbour.float())
    assert not has_neighbour[9] and (widths > 0).all() and (widths <= 1).all()


def test_limits_of_the_temperature():
    graph = tiny_graph()
    receivers = graph["edge_index"][1]
    degree = receivers.bincount(minlength=10)
    cold = tiny_bandwidths(graph, temperature=1e-6)
    assert set(cold.flatten().tolist()) == {0.0, 1.0}
    for layer in cold:
        assert torch.equal(torch.zeros(10).index_add(0, receivers, layer), (degree > 0).float())
    torch.testing.assert_close(tiny_bandwidths(graph, temperature=1e6)[0], 1 / degree[receivers], rtol=0, atol=1e-4)


def test_bandwidths_differ_between_layers_and_directions_and_follow_the_generator():
    model, graph = tiny_model().train(), tiny_graph()
    first, again, other = (
        model(**graph, generator=torch.Generator().manual_seed(seed)).bandwidths for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0, :14], first[0, 14:])  # the same edges, the other way round


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_uniform_numbers_give_finite_bandwidths(uniform):
    noise = torch.full((1, 3), uniform)
    widths = bandwidth_mask(given_draw(noise), torch.tensor([0, 0, 1]), 2, 0.9)
    torch.testing.assert_close(widths, torch.tensor([0.5, 0.5, 1.0]))


def test_scores_are_standard_normal():
    receivers = torch.arange(40_000) // 2
    width = bandwidth_mask(keyed_draw(torch.tensor([3])), receivers, 20_000, 1.0).view(-1, 2)
    difference = (width[:, 0] / width[:, 1]).log()  # of two standard normal numbers
    assert abs(difference.mean()) < 0.05 and difference.std().item() == pytest.approx(math.sqrt(2), rel=0.03)


# --- pairs without an edge ---


def test_pairs_are_neither_edges_nor_loops_and_uniform_otherwise():
    edges = tiny_graph()["edge_index"]
    pairs = draw_non_edges(keyed_draw(torch.tensor([5])), edges, 10, 20_000)
    found = pairs[:, pairs[0] >= 0]
    assert found.shape[1] > 0.97 * 20_000  # 38 of 100 pairs are edges or loops, and 0.38 ** 4 = 0.02
    counts = torch.zeros(10, 10).index_put(tuple(found), torch.ones(found.shape[1]), accumulate=True)
    adjacency = torch.eye(10).index_put(tuple(edges), torch.ones(edges.shape[1])).bool()
    assert (counts[adjacency] == 0).all()
    allowed = counts[~adjacency]
    assert allowed.numel() == 62 and (allowed - allowed.mean()).abs().max() < 5 * allowed.mean().sqrt()


def test_a_complete_graph_has_no_pairs_and_no_part_of_the_loss():
    edges = (1 - torch.eye(4)).nonzero().T
    output = tiny_model().train()(torch.randn(4, 6), edges)
    assert (output.neg_edge_index == -1).all()
    assert output.losses["negative_0"] == 0 and output.losses["positive_0"] > 0


# --- propagation ---


def test_training_halves_what_a_node_has_and_what_it_hears():
    graph = tiny_graph()
    linear = {"hidden_act": "identity", "use_batch_norm": False, "hidden_dropout": 0.0}
    encoder = BandanaEncoder(BandanaEncoderConfig(num_features=6, hidden_size=8, num_hidden_layers=1, **linear))
    encoder.layers[0].convolution.bias.data.normal_()
    widths = tiny_bandwidths(graph, layers=1)
    sender, receiver = graph["edge_index"]
    convolution = encoder.layers[0].convolution
    weight, bias = convolution.lin.weight, convolution.bias
    own = graph["x"] @ weight.T
    heard = torch.zeros(10, 10).index_put((receiver, sender), widths[0])
    expected = 0.5 * own + 0.5 * heard @ own + bias
    expected[9] = own[9] + bias  # without neighbours
    torch.testing.assert_close(encoder(**graph, bandwidths=widths).last_hidden_state, expected, rtol=1e-5, atol=1e-5)

    adjacency = torch.eye(10).index_put((receiver, sender), torch.tensor(1.0))
    scale = adjacency.sum(1).rsqrt()
    expected = (scale[:, None] * adjacency * scale) @ own + bias
    torch.testing.assert_close(encoder(**graph).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_order_of_the_edges_changes_nothing():
    model, graph = tiny_model().train(), tiny_graph()
    widths = tiny_bandwidths(graph)
    order = torch.randperm(28, generator=torch.Generator().manual_seed(0))
    shuffled = {"edge_index": graph["edge_index"][:, order], "bandwidths": widths[:, order]}
    expected = model(**graph, bandwidths=widths, neg_edge_index=NON_EDGES)
    output = model(x=graph["x"], **shuffled, neg_edge_index=NON_EDGES)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-6, atol=1e-6)
    model.config.reference_edge_order = True  # the reference's fault, which this test finds
    assert not torch.isclose(
        model(**graph, bandwidths=widths, neg_edge_index=NON_EDGES).loss, expected.loss, rtol=1e-4
    )


def test_renaming_nodes_renames_their_states():
    model, graph = BandanaModel(tiny_model().config).eval(), tiny_graph()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    renamed = model(graph["x"][order], place[graph["edge_index"]]).last_hidden_state
    torch.testing.assert_close(renamed, model(**graph).last_hidden_state[order])


def test_graphs_side_by_side_are_encoded_as_alone():
    model, first, second = BandanaModel(tiny_model().config).eval(), tiny_graph(), tiny_graph(seed=1)
    edges = torch.cat([first["edge_index"], second["edge_index"] + 10], dim=1)
    both = model(torch.cat([first["x"], second["x"]]), edges).last_hidden_state
    torch.testing.assert_close(both, torch.cat([model(**graph).last_hidden_state for graph in (first, second)]))


# --- the loss ---


def test_loss_with_equal_bandwidths_is_a_cross_entropy():
    model, graph = tiny_model().train(), tiny_graph()
    ones = torch.ones(2, 28)
    output = model(**graph, bandwidths=ones, neg_edge_index=NON_EDGES)
    expected = 0.0
    for states in output.hidden_states:
        for pairs, label in ((graph["edge_index"], 0), (NON_EDGES, 1)):
            logits = model.decoder(states, pairs)
            expected = expected + F.cross_entropy(logits, torch.full((len(logits),), label)) / 2
    torch.testing.assert_close(output.loss, expected)


def test_loss_weighs_edges_by_their_bandwidths_and_takes_those_it_is_told():
    model, graph = tiny_model().train(), tiny_graph()
    widths, chosen = tiny_bandwidths(graph), torch.tensor([3, 20, 7])
    output = model(**graph, bandwidths=widths, neg_edge_index=NON_EDGES, loss_edges=chosen)
    logits = model.decoder(output.hidden_states[1], graph["edge_index"][:, chosen])
    expected = -(widths[1, chosen] * logits.log_softmax(dim=1)[:, 0]).mean()
    torch.testing.assert_close(output.losses["positive_1"], expected.detach())


def test_no_gradient_reaches_bandwidths_in_the_loss_or_layers_above():
    model, graph = tiny_model(excluded_layers=[1]).train(), tiny_graph()
    model(**graph).loss.backward()
    assert model.backbone.layers[0].convolution.lin.weight.grad.abs().max() > 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.backbone.layers[1].parameters())
    widths = tiny_bandwidths(graph).requires_grad_()
    states = [torch.randn(10, 8) for _ in range(2)]
    losses = model._losses(states, graph["edge_index"], widths, NON_EDGES, None)
    losses["positive_0"].backward()
    assert widths.grad is None


# --- what is built on it ---


def test_links_are_scored_without_the_decoder():
    model, graph = tiny_model().eval(), tiny_graph()
    states = model.backbone(**graph).last_hidden_state
    scores = model.link_scores(**graph, edge_label_index=NON_EDGES)
    torch.testing.assert_close(scores, (states[NON_EDGES[0]] * states[NON_EDGES[1]]).sum(1).sigmoid())


def test_classifier_trains_alone_or_with_the_encoder():
    graph, labels = tiny_graph(), torch.tensor([0, 1, -100, 0, 1, 1, -100, 0, 1, 0])
    for frozen in (True, False):
        model = BandanaForNodeClassification(tiny_model(freeze_encoder=frozen).config).train()
        model(**graph, labels=labels).loss.backward()
        assert model.backbone.training is not frozen
        assert (model.backbone.layers[0].convolution.lin.weight.grad is None) is frozen
        assert model.classifier.weight.grad.abs().max() > 0 and model.classifier.in_features == 16
    ignored = model(**graph, labels=torch.where(labels < 0, 1 - labels.clamp(min=0), labels)).loss
    assert not torch.isclose(ignored, model(**graph, labels=labels).loss)


def test_features_are_all_layers_or_the_last():
    graph = tiny_graph()
    cat, last = (tiny_model(node_features=kind).eval().node_features(**graph) for kind in ("cat", "last"))
    assert cat.shape == (10, 16) and last.shape == (10, 8)
    torch.testing.assert_close(cat.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(F.normalize(cat[:, 8:], dim=1), last)


def test_checkpoints_of_pretraining_serve_the_classifier(tmp_path):
    model, graph = tiny_model(), tiny_graph()
    model.save_pretrained(tmp_path)
    classifier, report = BandanaForNodeClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    assert classifier(**graph).logits.shape == (10, 3)
    assert not any(p.requires_grad for p in classifier.backbone.parameters())
    torch.testing.assert_close(classifier.eval().node_features(**graph), model.eval().node_features(**graph))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": [0.9]}, "1 numbers and the encoder 2 layers"),
        ({"excluded_layers": [0, 1]}, "one at least must stay"),
        ({"excluded_layers": [5]}, "0 to 1"),
        ({"negative_ratio": 0}, "negative_ratio is 0"),
        ({"node_features": "mean"}, "'mean'"),
        ({"decoder_num_layers": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        BandanaConfig(**settings)


def test_inputs_that_do_not_fit_are_named():
    model, graph = tiny_model(), tiny_graph()
    with pytest.raises(ValueError, match=r"\(10, 5\); the model takes \(nodes, 6\)"):
        model(graph["x"][:, :5], graph["edge_index"])
    with pytest.raises(ValueError, match=r"int64 \(2, edges\)"):
        model(graph["x"], graph["edge_index"].T)
    with pytest.raises(ValueError, match="no edges"):
        model(graph["x"], graph["edge_index"][:, :0])
    with pytest.raises(ValueError, match=r"expected \(2, 28\)"):
        model(**graph, bandwidths=torch.ones(1, 28))


def test_loss_falls_on_a_graph_of_two_groups():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(60) % 2
    linked = torch.rand(60, 60, generator=generator) < torch.where(group[:, None] == group, 0.2, 0.01)
    edges = linked.triu(1).nonzero().T
    graph = {"x": torch.randn(60, 6, generator=generator), "edge_index": torch.cat([edges, edges.flip(0)], dim=1)}
    model = tiny_model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for step in range(60):
        loss = model(**graph, generator=torch.Generator().manual_seed(step)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    scores = model.eval().link_scores(**graph, edge_label_index=torch.triu_indices(60, 60, 1))
    low, high = torch.triu_indices(60, 60, 1)
    same = group[low] == group[high]
    assert scores[same].mean() > scores[~same].mean() + 0.1


CITATIONS = Path(__file__).parents[4] / "shared" / "data" / "graphs"


@pytest.mark.slow
@pytest.mark.skipif(not CITATIONS.is_dir(), reason="needs the citation graphs in ../shared/data/graphs")
def test_links_of_cora_are_found_after_200_epochs(tmp_path):
    recipe = Path(__file__).parents[3] / "recipes" / "bandana_cora.yaml"
    run = ["--dataset_name", str(CITATIONS / "cora.npz"), "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    short = ["--max_steps", "200", "--probe_every_epochs", "200", "--save_strategy", "no"]
    history = train(*parse(["--config", str(recipe), *run, *short])).state.log_history
    assert [line["test_link_auc"] for line in history if "test_link_auc" in line][-1] > 0.93
