"""Manifold Mixup against its reference, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_masked import ManifoldMixup, ManifoldMixupConfig
from hf_masked.modeling.masked_supervision.manifold_mixup import (
    Mix,
    bce_softmax,
    draw_mix,
    eligible_layers,
    mixed_states,
)
from hf_masked.modeling.regularizers import cross_entropy, soft_targets
from hf_masked.randomness import sample_keys
from tests.modeling.masked_supervision.classifiers import CONFIGS, batch, classifier
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "manifold_mixup.json").read_text())


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, 0, torch.arange(count))


class PreActivationBlock(nn.Module):
    """He et al. (arXiv 1603.05027), as the reference's supervised experiments have it."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False))

    def forward(self, hidden):
        activated = self.bn1(hidden).relu()
        beside = self.shortcut(activated) if hasattr(self, "shortcut") else hidden
        return self.conv2(self.bn2(self.conv1(activated)).relu()) + beside


class PreActivationResNet(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        for stage in range(4):
            inner = channels * 2 ** max(stage - 1, 0)
            block = PreActivationBlock(inner, channels * 2**stage, 1 if stage == 0 else 2)
            self.add_module(f"layer{stage + 1}", nn.Sequential(block))
        self.linear = nn.Linear(channels * 8, classes)

    def forward(self, pixel_values):
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(pixel_values)))))
        return self.linear(F.avg_pool2d(hidden, 4).flatten(1))


@pytest.mark.parametrize("layer", PARITY["runs"])
def test_same_numbers_as_the_reference(layer):
    run = PARITY["runs"][layer]
    model = PreActivationResNet(PARITY["channels"], PARITY["num_classes"]).train()
    model.load_state_dict(filled({n: tuple(s) for n, s in PARITY["parameters"].items()}), strict=False)
    mix = Mix("input" if layer == "0" else f"layer{layer}", run["weight"], torch.tensor(run["partners"]))
    pixel_values = filled_pixels((4, 3, 32, 32), "mixup.pixels")
    targets = mix.of(soft_targets(torch.tensor(run["labels"]), PARITY["num_classes"]))
    with mixed_states(model, mix):
        logits = model(mix.of(pixel_values) if mix.layer == "input" else pixel_values)
    loss = bce_softmax(logits, targets)
    torch.testing.assert_close(logits, torch.tensor(run["logits"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets, torch.tensor(run["targets"]))
    assert loss.item() == pytest.approx(run["loss"], rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(run["gradient_norms"][name], rel=1e-4), name


def answer(model, inputs, mixup, key=0):
    """Logits, targets and loss of the one pass."""
    labels = inputs["labels"]
    pictures = {"pixel_values": inputs["pixel_values"]}
    (one,) = mixup.passes(model, pictures, soft_targets(labels, 3), cross_entropy, keys(len(labels), key))
    with one.context:
        logits = model(**one.inputs).logits
    return logits, one.targets, one.criterion(logits, one.targets)


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_a_weight_it_is_ordinary_training(kind):
    model, inputs = classifier(kind), batch()
    expected = model(**inputs)
    logits, _, loss = answer(model, inputs, ManifoldMixup(ManifoldMixupConfig(alpha=0.0)))
    assert torch.equal(logits, expected.logits)
    torch.testing.assert_close(loss, expected.loss)


@pytest.mark.parametrize("kind", CONFIGS)
def test_states_are_mixed_where_the_draw_says(kind):
    model, inputs = classifier(kind).eval(), batch()
    layers = eligible_layers(model, ManifoldMixupConfig())
    assert layers[0] == "input" and len(layers) == 2
    partners = torch.tensor([1, 2, 3, 4, 5, 0])
    clean, seen = {}, {}

    def keep(store):
        def hook(module, arguments, output):
            store["output"] = output[0] if isinstance(output, tuple) else output

        return hook

    handle = model.get_submodule(layers[1]).register_forward_hook(keep(clean))
    plain = model(inputs["pixel_values"]).logits
    handle.remove()
    mix = Mix(layers[1], 0.3, partners)
    with mixed_states(model, mix):  # whose hook comes first
        handle = model.get_submodule(layers[1]).register_forward_hook(keep(seen))
        mixed = model(inputs["pixel_values"]).logits
        handle.remove()
    torch.testing.assert_close(seen["output"], 0.3 * clean["output"] + 0.7 * clean["output"][partners])
    assert not torch.allclose(mixed, plain)
    assert torch.equal(model(inputs["pixel_values"]).logits, plain), "the hook is gone"


def test_mixing_the_input_is_mixup():
    model, inputs = classifier("vit"), batch()
    mixup = ManifoldMixup(ManifoldMixupConfig(layers=["input"]))
    logits, targets, _ = answer(model, inputs, mixup)
    mix = mixup.last
    pictures = inputs["pixel_values"]
    expected = model(mix.weight * pictures + (1 - mix.weight) * pictures[mix.partners]).logits
    assert torch.equal(logits, expected) and 0 < mix.weight < 1
    one_hot = F.one_hot(inputs["labels"], 3).float()
    torch.testing.assert_close(targets, mix.weight * one_hot + (1 - mix.weight) * one_hot[mix.partners])


def test_in_a_linear_network_it_does_not_matter_where_states_are_mixed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3))
    inputs, mix = torch.randn(4, 5), Mix("", 0.4, torch.tensor([3, 0, 1, 2]))
    expected = model(mix.of(inputs))
    for layer in ("0", "1"):
        with mixed_states(model, Mix(layer, mix.weight, mix.partners)):
            torch.testing.assert_close(model(inputs), expected)


def test_targets_and_losses():
    mix, labels = Mix("input", 0.2, torch.tensor([2, 0, 1])), torch.tensor([0, 1, 2])
    targets, logits = mix.of(soft_targets(labels, 3)), torch.randn(3, 3)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    expected = 0.2 * F.cross_entropy(logits, labels) + 0.8 * F.cross_entropy(logits, labels[mix.partners])
    torch.testing.assert_close(cross_entropy(logits, targets), expected)
    p = logits.softmax(dim=1)
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(bce_softmax(logits, targets), by_hand)


def test_draws():
    config, layers = ManifoldMixupConfig(alpha=2.0), ["input", "a", "b"]
    mixes = [draw_mix(config, layers, keys(4, seed)) for seed in range(3000)]
    weights = torch.tensor([mix.weight for mix in mixes])
    assert weights.mean() == pytest.approx(0.5, abs=0.02) and weights.var() == pytest.approx(0.05, abs=0.005)
    counts = torch.tensor([[mix.layer == name for name in layers] for mix in mixes]).sum(dim=0)
    assert ((counts - 1000).square() / 1000).sum() < 13.8, "chi-square, one in a thousand"
    assert torch.equal(draw_mix(config, layers, keys(4)).partners, draw_mix(config, layers, keys(4)).partners)


def test_names_that_the_model_has_not_got_are_said():
    model = classifier("vit")
    with pytest.raises(ValueError, match=r"no modules.*nowhere"):
        eligible_layers(model, ManifoldMixupConfig(layers=["input", "nowhere"]))
    with pytest.raises(ValueError, match="alpha is -1"):
        ManifoldMixupConfig(alpha=-1)
    with pytest.raises(ValueError, match="loss is 'mse'"):
        ManifoldMixupConfig(loss="mse")
    with pytest.raises(ValueError, match="layers is 'input'"):
        ManifoldMixupConfig(layers="input")
