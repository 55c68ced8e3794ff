"""Masks: exact counts, and the distribution that each kind promises."""

import itertools
import math
import random

import pytest
import torch

from hf_masked.processing.masks import (
    MASKS,
    block_mask,
    coarse_mask,
    grid_mask,
    make_mask,
    num_masked_units,
    random_mask,
    register_mask,
)
from hf_masked.randomness import given_draw, keyed_draw, sample_keys

GRIDS = [(14, 14), (4, 4), (14, 7), (2, 16), (1, 9)]


def draw_for(batch: int, seed: int = 0):
    return keyed_draw(sample_keys(seed, 0, range(batch)))


@pytest.mark.parametrize(
    ("units", "ratio", "masked"), [(196, 0.75, 147), (49, 0.75, 37), (196, 0.0, 0), (196, 1.0, 196), (196, 0.4, 79)]
)
def test_count_is_maes(units, ratio, masked):
    assert num_masked_units((units,), ratio) == masked == units - int(units * (1 - ratio))


@pytest.mark.parametrize("ratio", [-0.25, 1.25, float("nan")])
@pytest.mark.parametrize("kind", ["random", "block", "coarse", "color", "grid", "inverse_block"])
def test_ratio_outside_0_to_1_is_refused(kind, ratio):
    with pytest.raises(ValueError, match=r"mask ratio"):
        make_mask(kind, draw_for(2), (4, 4), ratio)


@pytest.mark.parametrize("mask", [random_mask, block_mask])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.5, 0.75, 0.9, 1.0])
def test_count_is_exact(mask, grid, ratio):
    masks = mask(draw_for(64), grid, ratio)
    assert masks.dtype == torch.bool and masks.shape == (64, grid[0] * grid[1])
    assert masks.sum(dim=1).unique().tolist() == [num_masked_units(grid, ratio)]


@pytest.mark.parametrize("regular", [False, True])
@pytest.mark.parametrize(("grid", "window", "ratio"), [((14, 14), 2, 0.75), ((4, 8), 2, 0.5), ((6, 9), 3, 1 / 3)])
def test_grid_masks_the_same_count_in_every_window(grid, window, ratio, regular):
    masks = grid_mask(draw_for(64), grid, ratio, window=window, regular=regular).view(64, *grid)
    windows = masks.unfold(1, window, window).unfold(2, window, window).flatten(3)  # (batch, down, across, cells)
    assert (windows.sum(dim=3) == round(ratio * window**2)).all()
    same = (windows == windows[:, :1, :1]).all(dim=3).flatten(1).all(dim=1)
    assert same.all() if regular else not same.any()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_grid_reaches_both_ends(ratio):
    assert (grid_mask(draw_for(3), (4, 4), ratio).float() == ratio).all()


def test_grid_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="does not divide the grid 7 x 4"):
        grid_mask(draw_for(1), (7, 4), 0.75)
    with pytest.raises(ValueError, match=r"0\.6 .*k / 4"):
        grid_mask(draw_for(1), (4, 4), 0.6)


@pytest.mark.parametrize("kind", ["random", "block", "coarse", "color", "grid", "inverse_block"])
def test_samples_differ_and_repeat_with_their_keys(kind):
    masks = make_mask(kind, draw_for(100), (14, 14), 0.75)
    # Of inverse blocks there are few: about 196 places, in some shapes.
    assert masks.unique(dim=0).shape[0] >= (90 if kind == "inverse_block" else 100)
    assert torch.equal(make_mask(kind, draw_for(100), (14, 14), 0.75), masks)
    assert not torch.equal(make_mask(kind, draw_for(100, seed=1), (14, 14), 0.75), masks)
    keys = sample_keys(0, 0, [42, 7])
    assert torch.equal(make_mask(kind, keyed_draw(keys), (14, 14), 0.75), masks[[42, 7]])


@pytest.mark.parametrize(("size", "unit", "squares"), [(48, 8, 22), (14, 2, 30)])
def test_coarse_masks_simmims_squares_whole(size, unit, squares):
    """Swin with patch 4 at 192 px and ViT with patch 16 at 224 px, squares of 32 px: 22 of 36 and 30 of 49."""
    masks = coarse_mask(draw_for(64), (size, size), 0.6, unit=unit).view(64, size, size)
    cells = masks.unfold(1, unit, unit).unfold(2, unit, unit).flatten(3)
    assert (cells == cells[..., :1]).all()
    assert cells[..., 0].flatten(1).sum(dim=1).unique().tolist() == [squares]


def test_coarse_count_is_the_ceiling_that_simmim_takes():
    assert all(num_masked_units((n,), 0.6) == math.ceil(n * 0.6) for n in range(1, 2000))


def test_coarse_squares_are_in_raster_order_and_may_fill_a_rectangle():
    noise = torch.tensor([[0.1, 0.9, 0.8, 0.2, 0.3, 0.7]])  # 2 x 3 squares; the three smallest stay visible
    expected = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(coarse_mask(given_draw(noise), (4, 6), 0.5).view(4, 6), expected)


@pytest.mark.parametrize("unit", [0, 3])
def test_coarse_squares_that_do_not_tile_are_refused(unit):
    with pytest.raises(ValueError, match=rf"{unit} x {unit} units do not tile the grid 4 x 6"):
        coarse_mask(draw_for(1), (4, 6), 0.5, unit=unit)


@pytest.mark.parametrize("kind", ["random", "coarse", "grid", "inverse_block"])
def test_every_unit_has_the_same_chance(kind):
    frequency = make_mask(kind, draw_for(4000), (6, 8), 0.75).float().mean(dim=0)
    assert (frequency - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_random_masks_units_independently_of_their_neighbours():
    """Without replacement two units are both masked with probability m (m - 1) / (u (u - 1))."""
    masks = random_mask(draw_for(8000), (4, 4), 0.5).float()
    together = (masks.T @ masks / 8000)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 8 * 7 / (16 * 15)).abs().max() < 5 * (0.25 / 8000) ** 0.5


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.9])
def test_random_mask_of_given_noise_is_maes(ratio):
    noise = torch.rand(5, 21, generator=torch.Generator().manual_seed(0))
    expected = torch.ones(5, 21, dtype=torch.bool)
    for row in range(5):
        for unit in sorted(range(21), key=lambda unit: noise[row, unit].item())[: int(21 * (1 - ratio))]:
            expected[row, unit] = False
    assert torch.equal(random_mask(given_draw(noise), (3, 7), ratio), expected)


def solid_squares(masks: torch.Tensor, side: int) -> float:
    """Mean number of fully masked squares per sample: (batch, rows, columns)."""
    return masks.unfold(1, side, 1).unfold(2, side, 1).flatten(3).all(dim=3).float().sum(dim=(1, 2)).mean().item()


def edges(masks: torch.Tensor) -> float:
    """Mean number of borders between a masked and a visible unit."""
    return ((masks[:, 1:] != masks[:, :-1]).sum() + (masks[:, :, 1:] != masks[:, :, :-1]).sum()).item() / len(masks)


@pytest.mark.parametrize("grid", [(14, 14), (7, 28)])
def test_block_masks_are_made_of_rectangles(grid):
    block, random = (mask(draw_for(500), grid, 0.4).view(500, *grid) for mask in (block_mask, random_mask))
    assert solid_squares(block, 3) > 10 > 1 > solid_squares(random, 3)
    assert edges(block) < 0.6 * edges(random)


def test_block_that_takes_all_at_once_is_one_rectangle():
    masks = block_mask(draw_for(200), (14, 14), 25 / 196, min_units=25, min_aspect=0.99).view(200, 14, 14)
    rows, columns = masks.any(dim=2).sum(dim=1), masks.any(dim=1).sum(dim=1)
    assert ((rows == 5) & (columns == 5)).float().mean() == 1


def test_block_aspect_ratio_is_balanced():
    masks = block_mask(draw_for(2000), (20, 20), 20 / 400, min_units=20).view(2000, 20, 20)
    # A rectangle's rounded area may exceed the 20 units and is then refused: look at the clean ones only.
    rows, columns = masks.any(dim=2).sum(dim=1), masks.any(dim=1).sum(dim=1)
    clean = rows * columns == 20
    taller, wider = (rows > columns)[clean].sum().item(), (columns > rows)[clean].sum().item()
    assert clean.float().mean() > 0.5 and abs(taller - wider) < 5 * (taller + wider) ** 0.5
    assert set(rows[clean].tolist()) == {4, 5} and min(taller, wider) > 250


def beit_mask(rng: random.Random, rows: int, columns: int, target: int) -> list[list[bool]]:
    """BEiT's algorithm 1 with loops, as its reference has it: up to ten tries for each rectangle."""
    mask = [[False] * columns for _ in range(rows)]
    remaining = target
    while remaining:
        for _ in range(10):
            area = rng.uniform(16, remaining)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            cells = itertools.product(range(top, top + height), range(left, left + width))
            new = [(row, column) for row, column in cells if not mask[row][column]]
            if 0 < len(new) <= remaining:
                for row, column in new:
                    mask[row][column] = True
                remaining -= len(new)
                break
        else:
            break
    return mask


def test_block_masks_are_distributed_as_beits():
    rng = random.Random(0)
    beit = torch.tensor([beit_mask(rng, 14, 14, 79) for _ in range(400)])
    ours = block_mask(draw_for(2000), (14, 14), 0.4).view(2000, 14, 14)
    assert (beit.float().mean(dim=0) - ours.float().mean(dim=0)).abs().mean() < 0.03
    assert edges(ours) == pytest.approx(edges(beit), rel=0.1)


def test_unknown_kind_names_the_known():
    with pytest.raises(
        ValueError, match="'blocks'; known are block, coarse, color, frame, grid, inverse_block, random, tube"
    ):
        make_mask("blocks", draw_for(1), (4, 4), 0.5)


def test_registered_mask_can_be_made(monkeypatch):
    monkeypatch.setattr("hf_masked.processing.masks.MASKS", dict(MASKS))

    def first_units(draw, grid, ratio, skip=0):
        return torch.arange(grid[0] * grid[1]) < num_masked_units(grid, ratio) + skip + 0 * draw(1)

    register_mask("first", first_units)
    register_mask("first", first_units)
    assert make_mask("first", draw_for(1), (2, 2), 0.5, skip=1).tolist() == [[True, True, True, False]]
    with pytest.raises(ValueError, match="'first' exists already"):
        register_mask("first", random_mask)
