"""MaskSub against the smallest units of its reference that run alone, and every check of its spec (section 11)."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_masked import MaskSub, MaskSubConfig
from hf_masked.modeling.masked_supervision.masksub import (
    TOKENS,
    dropped_tokens,
    frozen_batch_norm,
    mask_input_ids,
    mask_squares,
    mode_of,
)
from hf_masked.modeling.regularizers import binary_cross_entropy, criterion_of, cross_entropy, soft_targets
from hf_masked.randomness import keyed_draw, sample_keys
from tests.modeling.masked_supervision.classifiers import CONFIGS, batch, classifier, text_classifier
from tests.parity.fill import filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "masksub.json").read_text())


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, 0, torch.arange(count))


class Embeddings(nn.Module):
    """A model that is its embeddings."""

    def __init__(self, embedded: torch.Tensor):
        super().__init__()
        self.config, self.base_model = ViTLike(), self
        self.embeddings = nn.Identity()
        self.embedded = embedded

    def forward(self):
        return self.embeddings(self.embedded)


class ViTLike:
    model_type = "vit"


@pytest.mark.parametrize("name", PARITY["tokens"])
def test_the_references_tokens_stay(name):
    run = PARITY["tokens"][name]
    units = run["units"]
    embedded = torch.arange(1 + units).float().view(1, -1, 1).expand(3, -1, 2)
    noise = filled_noise(3, units, f"{name}.noise")
    model = Embeddings(embedded)
    with dropped_tokens(model, lambda n: noise, run["ratio"], nullcontext()):
        seen = model()
    assert (seen[:, 0] == 0).all() and run["class_token"]
    assert (seen[:, 1:, 0].long() - 1).tolist() == run["kept"]


def test_the_references_squares_are_ours_with_kept_and_removed_exchanged():
    """As the spec says of the released code, which at a half makes no difference."""
    run = PARITY["pixels"]["half"]
    noise = 1 - filled_noise(2, 4, "pixels.noise")
    masked = mask_squares(filled_pixels((2, 3, 64, 64), "masksub.pixels"), lambda n: noise, run["ratio"], run["side"])
    removed = (masked == 0).all(dim=1).unflatten(1, (2, 32)).unflatten(3, (2, 32)).all(dim=4).all(dim=2)
    assert removed.flatten(1).tolist() == run["removed"]


def run_passes(model, inputs, masksub, key=0, labels=None):
    """The two passes with their logits, and the gradients of each backward pass by itself."""
    labels = inputs["labels"] if labels is None else labels
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    found = []
    targets = soft_targets(labels, model.config.num_labels)
    for one in masksub.passes(model, rest, targets, criterion_of(model), keys(len(labels), key)):
        with one.context:
            one.logits = model(**one.inputs).logits
            loss = one.weight * one.criterion(one.logits, one.targets)
            loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((one, loss.detach(), gradients))
        model.zero_grad()
    return found


def test_half_of_the_tokens_are_seen_and_the_class_token():
    model = classifier("vit")
    seen = []
    model.vit.layers[0].register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape[1]))
    run_passes(model, batch(), MaskSub(MaskSubConfig()))
    assert seen == [17, 9]


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_a_mask_both_passes_agree(kind):
    model, inputs = classifier(kind), batch()
    (main, first, _), (sub, second, _) = run_passes(model, inputs, MaskSub(MaskSubConfig(mask_ratio=0.0)))
    torch.testing.assert_close(sub.logits, main.logits, rtol=1e-4, atol=1e-5)
    p = main.logits.softmax(dim=1)
    torch.testing.assert_close(first, 0.5 * F.cross_entropy(main.logits, inputs["labels"]))
    torch.testing.assert_close(second, -0.5 * (p * p.log()).sum(dim=1).mean(), rtol=1e-4, atol=1e-5)


def test_two_backward_passes_are_the_gradient_of_the_sum():
    model, inputs = classifier("vit"), batch()
    found = run_passes(model, inputs, MaskSub(MaskSubConfig()))
    masksub = MaskSub(MaskSubConfig())
    total, rest = 0, {"pixel_values": inputs["pixel_values"]}
    for one in masksub.passes(model, rest, soft_targets(inputs["labels"], 3), cross_entropy, keys(6)):
        with one.context:
            one.logits = model(**one.inputs).logits
        total = total + one.weight * one.criterion(one.logits, one.targets)
    total.backward()
    for name, parameter in model.named_parameters():
        summed = sum(gradients[name] for *_, gradients in found)
        torch.testing.assert_close(parameter.grad, summed, rtol=1e-5, atol=1e-7)


def test_the_masked_pass_learns_from_the_prediction_alone():
    model, inputs = classifier("vit"), batch()
    (main, _, _), (sub, _, gradients) = run_passes(model, inputs, MaskSub(MaskSubConfig()))
    assert not sub.targets.requires_grad
    torch.testing.assert_close(sub.targets, main.logits.detach().softmax(dim=1))
    _, (_, _, others) = run_passes(model, inputs, MaskSub(MaskSubConfig()), labels=inputs["labels"].flip(0))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


def test_targets_follow_the_criterion():
    logits = torch.randn(4, 3)
    for target, criterion, expected in (
        ("auto", cross_entropy, logits.softmax(dim=1)),
        ("auto", binary_cross_entropy, logits.sigmoid()),
        ("sigmoid", cross_entropy, logits.sigmoid()),
        ("softmax", binary_cross_entropy, logits.softmax(dim=1)),
    ):
        found = MaskSub(MaskSubConfig(target=target))._prediction(logits, criterion)
        torch.testing.assert_close(found, expected)
    at_best = logits.clone().requires_grad_()
    binary_cross_entropy(at_best, logits.sigmoid()).backward()
    torch.testing.assert_close(at_best.grad, torch.zeros(4, 3), atol=1e-7, rtol=0)
    assert criterion_of(classifier("vit", problem_type="multi_label_classification")) is binary_cross_entropy


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_share_of_squares(ratio):
    pixels = torch.ones(5, 3, 64, 64)
    masked = mask_squares(pixels, keyed_draw(keys(5)), ratio, 16)
    assert ((masked == 0).float().mean(dim=(1, 2, 3)) == ratio).all()
    blocks = masked[:, 0].unflatten(1, (4, 16)).unflatten(3, (4, 16))
    assert torch.equal(blocks.amax(dim=(2, 4)), blocks.amin(dim=(2, 4))), "whole squares"
    assert mask_squares(pixels, keyed_draw(keys(5)), ratio, 24).shape == pixels.shape, "cut at the border"


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_nothing_is_left_behind_after_an_exception(kind):
    model, inputs = classifier(kind).eval(), batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    config = MaskSubConfig(freeze_batch_norm_in_sub=True)
    (_, second) = run_passes(classifier(kind), inputs, MaskSub(config))
    context = MaskSub(config)._masked(model, {"pixel_values": inputs["pixel_values"]}, keyed_draw(keys(6)))[1]
    with pytest.raises(RuntimeError, match="stop"), context:
        raise RuntimeError("stop")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert second[0].name == "sub"


def test_running_statistics_can_be_spared():
    model = classifier("resnet")
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    with frozen_batch_norm(model, frozen=True):
        model(**batch())
    assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 0
    with frozen_batch_norm(model, frozen=False):
        model(**batch())
    assert not torch.equal(norm.running_mean, before)


def test_special_tokens_and_padding_are_never_masked():
    config = MaskSubConfig(mode="input_ids", mask_ratio=0.5, mask_token_id=39, special_token_ids=[1, 2])
    ids = torch.randint(3, 39, (200, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 7], ids[:, 8:] = 1, 2, 0
    attention_mask = (torch.arange(12) < 8).long().expand(200, -1)
    masked = mask_input_ids(ids, attention_mask, keyed_draw(keys(200)), config)
    changed = masked != ids
    assert not changed[:, [0, 7, 8, 9, 10, 11]].any() and (changed.sum(dim=1) == 3).all()
    assert changed.float().mean(dim=0)[1:7].min() > 0.35
    model = text_classifier()
    inputs = {"input_ids": ids[:4], "attention_mask": attention_mask[:4], "labels": torch.tensor([0, 1, 2, 0])}
    (_, _, gradients), (sub, *_) = run_passes(model, inputs, MaskSub(config))
    assert (sub.inputs["input_ids"] == 39).any() and gradients


def test_modes_by_type_of_model():
    assert {kind for kind in CONFIGS if mode_of(classifier(kind), MaskSubConfig()) == "drop_tokens"} == set(
        TOKENS
    ) & set(CONFIGS)
    with pytest.raises(ValueError, match="Tokens of a swin cannot be dropped"):
        mode_of(classifier("swin"), MaskSubConfig(mode="drop_tokens"))
    with pytest.raises(ValueError, match="A bert reads texts"):
        mode_of(text_classifier(), MaskSubConfig())
    with pytest.raises(ValueError, match="needs mask_token_id"):
        MaskSubConfig(mode="input_ids")
    wrong = {"mask_ratio": 1.0, "mode": "x", "target": "x", "pixel_patch_size": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            MaskSubConfig(**{name: value})
