"""Masking of pretrained language models: the paper's claims, and its reference's numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

pytest.importorskip("peft", reason="tuners need the extra [peft]")

from peft import get_peft_model

from hf_masked import MaskingLMConfig, harden_masks, read_masks, sparsity
from hf_masked.modeling.weight_masking.masking_lm import MaskingLMLayer, sparsity_target
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "masking_lm.json").read_text())
SIZE = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHAPES = {"dense.weight": (8, 12), "dense.bias": (8,)}
IDS = torch.arange(10).view(2, 5)


class OneLayer(nn.Module):
    """What the reference's layer replaces: 12 inputs, 8 outputs, two heads."""

    def __init__(self):
        super().__init__()
        self.config = BertConfig(num_attention_heads=2, hidden_size=8)
        self.query = nn.Linear(12, 8)
        self.query.load_state_dict(
            {
                "weight": filled({"dense.weight": (8, 12)})["dense.weight"],
                "bias": filled({"dense.bias": (8,)})["dense.bias"],
            }
        )

    def forward(self, inputs):
        return self.query(inputs)


def one_layer(**settings):
    model = get_peft_model(OneLayer(), MaskingLMConfig(target_modules=["query"], **settings))
    return model, model.base_model.model.query


def encoder(seed: int = 0, **settings):
    torch.manual_seed(seed)
    base = BertModel(BertConfig(**SIZE)).eval()
    return base, get_peft_model(base, MaskingLMConfig(**settings)).eval()


def close(ours: torch.Tensor, theirs: list) -> bool:
    theirs = torch.tensor(theirs)
    return bool((ours.detach().flatten() - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        ("threshold", {}),
        ("sign", {"binarizer": "sign"}),
        ("heads", {"granularity": "head"}),
        ("layers", {"granularity": "matrix"}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_reference(run, settings):
    stored = PARITY[run]
    model, layer = one_layer(**settings)
    scores = layer.scores["default"]
    with torch.no_grad():
        given = stored["scale"] * filled_pixels(tuple(stored["shape"]), stored["fill"])
        scores.copy_(given.view(scores.shape))
    outputs = model.train()(filled_pixels((3, 12), "input"))
    (outputs * filled_pixels((3, 8), "upstream")).sum().backward()
    assert close(outputs, stored["outputs"]) and close(scores.grad, stored["gradient"])
    assert close(scores, stored["scores_after"])
    assert run in ("heads", "layers") or 0.05 < sparsity(model) < 0.95


def test_intervals_and_initial_masks_are_those_of_the_reference():
    for ratio, interval in PARITY["intervals"].items():
        assert MaskingLMConfig(init_sparsity=float(ratio)).interval == pytest.approx(interval, rel=1e-6)
    for ratio, interval in PARITY["bernoulli"].items():
        found = MaskingLMConfig(binarizer="bernoulli", init_sparsity=float(ratio)).interval
        assert found == pytest.approx(interval, rel=1e-6)
    for ratio, scores in PARITY["magnitude"].items():
        _, layer = one_layer(init="magnitude", init_sparsity=float(ratio))
        assert torch.allclose(layer.scores["default"].flatten(), torch.tensor(scores))


def test_targets_of_sparsity_are_those_of_the_reference():
    config = MaskingLMConfig(init_sparsity=0.05, target_sparsity=0.6, sparsity_weight=1.0)
    for percent, target in PARITY["targets"]:
        assert sparsity_target(config, percent / 100) == pytest.approx(target, abs=1e-9)


def test_all_kept_is_the_base_and_none_kept_is_the_bias():
    base, model = encoder()
    with model.disable_adapter(), torch.no_grad():
        expected = base(input_ids=IDS).last_hidden_state
    layers = [module for module in model.modules() if isinstance(module, MaskingLMLayer)]
    assert len(layers) == 2 * 6 + 1
    with torch.no_grad():
        for layer in layers:
            layer.scores["default"].fill_(0.02)
        assert torch.equal(model(input_ids=IDS).last_hidden_state, expected)
        layers[0].scores["default"].fill_(0.01)
        x = torch.randn(3, 16)
        assert torch.equal(layers[0](x), layers[0].base_layer.bias.expand(3, -1))


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_the_initial_share_is_as_asked(ratio):
    _, model = encoder(init_sparsity=ratio)
    masks = read_masks(model)
    weights = sum(mask.numel() for mask in masks.values())
    assert abs(sparsity(model) - ratio) < 3 * math.sqrt(ratio * (1 - ratio) / weights)
    for init in ("magnitude", "uniform", "double_uniform"):
        _, model = encoder(init_sparsity=ratio, init=init)
        for mask in read_masks(model).values():
            assert (~mask).sum() == math.floor(ratio * mask.numel())


def test_magnitude_drops_the_smallest_even_if_that_is_none():
    _, model = encoder(init="magnitude", init_sparsity=0.25)
    weights = dict(model.named_parameters())
    for name, mask in read_masks(model).items():
        weight = weights[f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"].abs()
        assert weight[~mask].max() <= weight[mask].min()
    assert one_layer(init="magnitude", init_sparsity=0.001)[1].units("default").all()


def test_two_intervals_lie_around_the_threshold():
    scores = one_layer(init="double_uniform", init_sparsity=0.5)[1].scores["default"].detach()
    kept = scores > 0.01
    assert scores[kept].min() >= 0.011 and scores[kept].max() <= 0.015
    assert scores[~kept].min() >= 0.005 and scores[~kept].max() <= 0.009


@pytest.mark.parametrize("binarizer", ["threshold", "bernoulli"])
def test_a_scores_gradient_is_the_weights_times_the_weight(binarizer):
    torch.manual_seed(0)
    model, layer = one_layer(binarizer=binarizer, init_sparsity=0.5)
    x = torch.randn(5, 12)
    upstream = torch.randn(5, 8)
    (model.train()(x) * upstream).sum().backward()
    expected = (upstream.T @ x) * layer.base_layer.weight
    assert torch.allclose(layer.scores["default"].grad, expected, atol=1e-6)


def test_sign_stops_at_one():
    model, layer = one_layer(binarizer="sign")
    with torch.no_grad():
        layer.scores["default"][0] = 1.7
        layer.scores["default"][1] = -1.0
    model.train()(torch.randn(3, 12)).sum().backward()
    assert layer.scores["default"].max() == 1 and not layer.scores["default"].grad[:2].any()
    assert layer.scores["default"].grad[2:].all()


def test_bernoulli_is_drawn_in_training_and_fixed_in_evaluation():
    model, layer = one_layer(binarizer="bernoulli", init_sparsity=0.3)
    assert (layer.scores["default"].sigmoid() - 0.7).abs().max() < 1e-6
    x = torch.randn(3, 12)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x)) and layer.units("default").all()


def test_one_bit_for_each_head_or_matrix(tmp_path):
    _, model = encoder(target_modules=["query", "key", "value"], granularity="head", init_sparsity=0.5)
    for mask in read_masks(model).values():
        rows = mask.reshape(2, -1).float().mean(dim=1)
        assert set(rows.tolist()) <= {0.0, 1.0}
    assert 0 < sparsity(model) < 1
    harden_masks(model)
    assert all(len(p) == 1 for name, p in model.state_dict().items() if "bits" in name)
    _, model = encoder(granularity="matrix", init_sparsity=0.5)
    assert {float(mask.float().mean()) for mask in read_masks(model).values()} == {0.0, 1.0}


def test_hardened_outputs_are_the_same_and_scores_are_gone():
    _, model = encoder(init_sparsity=0.3)
    before = model(input_ids=IDS).last_hidden_state
    harden_masks(model)
    assert torch.equal(model(input_ids=IDS).last_hidden_state, before)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="nothing to harden"):
        harden_masks(model, "other")


def test_conv1d_is_masked_as_a_linear_layer():
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    model = get_peft_model(base, MaskingLMConfig(init="magnitude", init_sparsity=0.5)).eval()
    outputs = model(input_ids=IDS).last_hidden_state
    masks = read_masks(model)
    assert masks["h.0.attn.c_attn.weight"].shape == (24, 8)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(input_ids=IDS).last_hidden_state, outputs, atol=1e-6)
    assert torch.equal(merged.h[0].attn.c_attn.weight.T != 0, masks["h.0.attn.c_attn.weight"])


def test_the_share_is_drawn_to_its_target():
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SIZE))
    config = MaskingLMConfig(target_sparsity=0.6, sparsity_weight=50.0, init_sparsity=0.2)
    model = get_peft_model(base, config).train()
    inputs = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    model.base_model.training_progress = 1.0
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    with model.disable_adapter():
        task = base(**inputs).loss
    assert model(**inputs).loss > task + 4
    for _ in range(25):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(sparsity(model) - 0.6) < 0.1
    assert model.eval()(**inputs).loss < 5, "the sparsity's loss is one of training"
    # The Trainer divides by the batches of a step only where it does not hand the model their number of items.
    model.train().base_model.accumulation_steps = 2
    model.base_model.training_progress = 0.0
    penalty = float(model.base_model.penalty())
    plain, shared = (float(model(**inputs, **more).loss) for more in ({}, {"num_items_in_batch": 2}))
    assert plain - shared == pytest.approx(penalty / 2, abs=0.3 * penalty) and penalty > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"binarizer": "step"}, "binarizer is 'step'"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"init_sparsity": 0}, "init_sparsity is 0"),
        ({"init_sparsity": 1.0}, "init_sparsity is 1.0"),
        ({"threshold": 0}, "threshold is 0"),
        ({"init": "magnitude", "binarizer": "sign"}, "does not go with"),
        ({"target_sparsity": 0.5}, "give both"),
        ({"target_sparsity": 1.0, "sparsity_weight": 1.0}, "target_sparsity is 1.0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskingLMConfig(**settings)


def test_layers_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"word_embeddings is a Embedding"):
        encoder(target_modules=["word_embeddings"])
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        base = BertModel(BertConfig(**SIZE))
        base.config.num_attention_heads = 5
        get_peft_model(base, MaskingLMConfig(granularity="head", target_modules=["query"]))
