"""Masks learn what the papers say, on handwritten digits of 8 x 8 pixels and small networks."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

pytest.importorskip("peft", reason="tuners need the extra [peft]")

from peft import get_peft_model

from hf_masked import FishMaskConfig, MaskingLMConfig, MaskLLMConfig, initialize_fish_mask, read_masks


class Perceptron(nn.Module):
    """64 pixels -> two hidden layers -> 10 classes."""

    def __init__(self, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(64, hidden), nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, 10)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> ModelOutput:
        logits = self.classifier(self.second(self.first(pixels).relu()).relu())
        return ModelOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1], classes, and which are held out."""
    data = load_digits()
    held_out = torch.arange(len(data.target)) % 3 == 0
    return torch.tensor(data.data).float() / 16, torch.tensor(data.target), held_out


def fit(model, pixels, labels, steps: int, rate: float):
    """Adam on batches of 64."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for step in range(steps):
        if hasattr(model, "base_model") and hasattr(model.base_model, "training_progress"):
            model.base_model.training_progress = step / steps
        rows = torch.randint(len(labels), (64,), generator=generator)
        model(pixels=pixels[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model, pixels, labels) -> float:
    return float((model.eval()(pixels=pixels).logits.argmax(-1) == labels).float().mean())


def pretrained(pixels, labels, hidden: int, steps: int = 400) -> Perceptron:
    torch.manual_seed(0)
    return fit(Perceptron(hidden), pixels, labels, steps, 2e-3)


def head_only(base):
    model = copy.deepcopy(base)
    model.requires_grad_(False).classifier.requires_grad_(True)
    return model


@pytest.mark.slow
def test_a_mask_learns_other_classes_than_the_frozen_weights(digits):
    pixels, labels, held_out = digits
    low = labels < 5
    train, test = ~low & ~held_out, ~low & held_out
    base = pretrained(pixels[low & ~held_out], labels[low & ~held_out], 256)
    torch.manual_seed(1)
    base.classifier.reset_parameters()
    untrained = Perceptron(256)
    config = MaskingLMConfig(target_modules=["first", "second", "classifier"], init_sparsity=0.5)
    found = {
        name: accuracy(fit(model, pixels[train], labels[train], 400, rate), pixels[test], labels[test])
        for name, model, rate in (
            ("head", head_only(base), 2e-3),
            ("mask", get_peft_model(copy.deepcopy(base), copy.deepcopy(config)), 5e-3),
            ("mask of random weights", get_peft_model(untrained, copy.deepcopy(config)), 5e-3),
        )
    }
    assert found["mask"] > found["head"] + 0.03, found
    assert found["mask"] > 0.93, found


@pytest.mark.slow
def test_few_chosen_weights_learn_more_than_the_head(digits):
    pixels, labels, held_out = digits
    base = pretrained(pixels[~held_out], labels[~held_out], 64)
    turned = pixels.view(-1, 8, 8).rot90(dims=(1, 2)).reshape(-1, 64)
    train = (~held_out).nonzero().flatten()[:300]
    found = {}
    for selection in ("fisher", "head"):
        model = head_only(base)
        if selection == "fisher":
            config = FishMaskConfig(
                keep_ratio=0.05, num_samples=128, modules_to_save=["classifier"], count_head_in_budget=False
            )
            model = get_peft_model(copy.deepcopy(base), config)
            initialize_fish_mask(model, [{"pixels": turned[train], "labels": labels[train]}])
        model = fit(model, turned[train], labels[train], 300, 5e-3)
        found[selection] = accuracy(model, turned[held_out], labels[held_out])
    assert found["fisher"] > found["head"] + 0.02, found


@pytest.mark.slow
def test_a_learnt_pattern_is_better_than_the_largest_weights(digits):
    pixels, labels, held_out = digits
    base = pretrained(pixels[~held_out], labels[~held_out], 24, steps=600)
    config = MaskLLMConfig(target_modules=["first", "second"], prior="magnitude", weight_norm_reg=0.0)
    torch.manual_seed(1)
    strong = copy.deepcopy(config)
    strong.prior_strength = 50.0
    one_shot = get_peft_model(copy.deepcopy(base), strong)
    before = read_masks(one_shot)
    torch.manual_seed(1)
    learnt = fit(get_peft_model(copy.deepcopy(base), config), pixels[~held_out], labels[~held_out], 600, 5e-3)
    found = [accuracy(model, pixels[held_out], labels[held_out]) for model in (base, one_shot, learnt)]
    agreement = sum(int((before[n] == m).sum()) for n, m in read_masks(learnt).items()) / (64 * 24 + 24 * 24)
    assert found[2] > found[1] and found[2] > found[0] - 0.03, found
    assert 0.5 < agreement < 0.99
