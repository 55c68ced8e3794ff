"""The shared parts on their own."""

import math

import pytest
import torch
from transformers import AutoConfig

from hf_masked.modeling.parts.backbones import build_backbone, encode_visible, load_backbone
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import take, visible_indices
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d
from hf_masked.modeling.parts.targets import denormalize_patches, normalize_patches


@pytest.mark.parametrize(("first_axis", "column_half"), [("column", 0), ("row", 1)])
def test_sincos_halves_belong_to_their_axes(first_axis, column_half):
    table = sincos_positions_2d(8, (3, 5), first_axis).view(3, 5, 2, 4)
    column, row = table[:, :, column_half], table[:, :, 1 - column_half]
    assert torch.equal(column, column[:1].expand(3, 5, 4)), "the column's half does not depend on the row"
    assert torch.equal(row, row[:, :1].expand(3, 5, 4))
    expected = [math.sin(4), math.sin(4 / 100), math.cos(4), math.cos(4 / 100)]
    torch.testing.assert_close(column[0, 4], torch.tensor(expected))


def test_sincos_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        sincos_positions_2d(6, (2, 2))
    with pytest.raises(ValueError, match="'diagonal'"):
        sincos_positions_2d(8, (2, 2), "diagonal")


def test_interpolation_keeps_prefix_corners_order_and_equal_grids():
    table = torch.cat([torch.full((1, 2, 4), 9.0), torch.arange(6.0).view(1, 6, 1).expand(1, 6, 4)], dim=1)
    assert interpolate_positions(table, (2, 3), (2, 3)) is table
    fitted = interpolate_positions(table, (2, 3), (4, 6))
    assert fitted.shape == (1, 2 + 24, 4) and torch.equal(fitted[:, :2], table[:, :2])
    grid = fitted[0, 2:, 0].view(4, 6)
    assert (grid.diff(dim=0) > 0).all(), "rows grow downwards"
    assert (grid.diff(dim=1) > 0).all(), "columns grow to the right"


def test_visible_indices_are_in_raster_order():
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    expected = [[1, 3, 4], [0, 1, 4]]
    assert visible_indices(mask).tolist() == expected
    assert visible_indices(mask, num_masked=2).tolist() == expected
    units = torch.arange(10.0).view(2, 5, 1)
    assert take(units, visible_indices(mask)).squeeze(-1).tolist() == [[1, 3, 4], [5, 6, 9]]


def test_masked_mean_is_over_the_batch_and_safe_without_a_mask():
    loss = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(loss, mask) == pytest.approx((1 + 2 + 4) / 3)
    assert masked_mean(loss, torch.zeros_like(mask)) == 0


def test_normalization_of_patches_inverts():
    patches = torch.randn(2, 3, 12) * 5 + 1
    torch.testing.assert_close(denormalize_patches(normalize_patches(patches), patches), patches)


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2"])
def test_all_patches_visible_is_the_plain_backbone(model_type):
    config = AutoConfig.for_model(
        model_type, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=8,
    )  # fmt: skip
    backbone = build_backbone(config).eval()
    assert getattr(backbone, "pooler", None) is None
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = backbone(pixel_values).last_hidden_state
    torch.testing.assert_close(encode_visible(backbone, pixel_values), expected, rtol=1e-5, atol=1e-5)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encode_visible(backbone, pixel_values, everything), expected, rtol=1e-5, atol=1e-5)


def test_missing_checkpoints_are_named():
    with pytest.raises(ValueError, match="/no/such/folder is neither a folder"):
        load_backbone("/no/such/folder")
