"""The fill must never change: stored values of the references hang on it."""

import pytest
import torch

from tests.parity.fill import filled, filled_noise, filled_pixels


def test_numbers_are_those_of_the_stored_runs():
    weights = filled({"blocks.0.attn.qkv.weight": (6, 4), "norm.weight": (4,), "cls_token": (1, 1, 4)})
    assert weights["blocks.0.attn.qkv.weight"][1].tolist() == pytest.approx(
        [-0.09927392, 0.76698726, -0.80619282, -0.70608711], abs=1e-7
    )
    assert weights["norm.weight"].tolist() == pytest.approx([1.0168885, 0.91442734, 0.97462296, 1.0184599], abs=1e-7)
    assert weights["cls_token"].flatten().tolist() == pytest.approx(
        [0.17327797, 0.11693142, 0.11160507, 0.17702746], abs=1e-7
    )
    assert filled_pixels((1, 1, 2, 2), "x").flatten().tolist() == pytest.approx(
        [0.93249202, -1.9936419, -0.62665153, -0.38504291], abs=1e-7
    )
    assert filled_noise(1, 4, "x").tolist() == [[0.875, 0.125, 0.375, 0.625]]


def test_matrices_keep_the_scale_of_their_input():
    weight = filled({"fc.weight": (400, 300)})["fc.weight"]
    assert weight.std().item() == pytest.approx(300**-0.5, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * 300**-0.5


def test_names_decide():
    weights = filled({"a.bias": (50,), "b.bias": (50,)})
    assert not torch.equal(weights["a.bias"], weights["b.bias"])
    assert torch.equal(weights["a.bias"], filled({"a.bias": (50,)})["a.bias"])


def test_noise_is_distinct_within_a_row():
    noise = filled_noise(3, 196)
    assert all(len(set(row)) == 196 for row in noise.tolist())
    assert noise.min() > 0 and noise.max() < 1
