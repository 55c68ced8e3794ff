"""Masks of clips: tubes, frames, and random units of a grid of three axes."""

import pytest
import torch

from hf_masked.processing.masks import MASKS, make_mask, num_masked_of_kind
from hf_masked.randomness import keyed_draw, sample_keys

GRID = (8, 4, 6)


def masks_of(kind: str, ratio: float = 0.75, grid=GRID) -> torch.Tensor:
    draw = keyed_draw(sample_keys(0, 0, torch.arange(50)))
    return make_mask(kind, draw, grid, ratio)


@pytest.mark.parametrize("kind", ["random", "tube", "frame"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9, 1.0])
def test_counts_are_exact(kind, ratio):
    mask = masks_of(kind, ratio)
    assert mask.dtype == torch.bool and mask.shape == (50, 192)
    assert (mask.sum(dim=1) == num_masked_of_kind(kind, GRID, ratio)).all()


def test_tubes_mask_the_same_places_at_all_times_and_frames_all_places_of_a_time():
    tubes = masks_of("tube").unflatten(1, GRID)
    assert (tubes == tubes[:, :1]).all() and num_masked_of_kind("tube", GRID, 0.75) == 8 * 18
    frames = masks_of("frame").unflatten(1, GRID)
    assert (frames == frames[:, :, :1, :1]).all() and num_masked_of_kind("frame", GRID, 0.75) == 6 * 24
    agnostic = masks_of("random").unflatten(1, GRID)
    assert (agnostic != agnostic[:, :1]).any() and (agnostic != agnostic[:, :, :1, :1]).any()


@pytest.mark.parametrize("kind", ["tube", "frame"])
def test_every_unit_has_the_same_chance(kind):
    draw = keyed_draw(sample_keys(0, 0, torch.arange(4000)))
    share = make_mask(kind, draw, (4, 2, 2), 0.5).float().mean(dim=0)
    assert (share - 0.5).abs().max() < 0.04


@pytest.mark.parametrize("kind", ["tube", "frame"])
def test_a_plane_is_refused(kind):
    assert kind in MASKS
    with pytest.raises(ValueError, match=r"needs a grid \(times, rows, columns\), not \(4, 6\)"):
        masks_of(kind, grid=(4, 6))
