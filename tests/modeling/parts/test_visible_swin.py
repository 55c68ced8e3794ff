"""Swin on visible units against transformers' own Swin, whose windows are told to leave masked tokens out."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import SwinConfig, SwinModel
from transformers.models.swin.modeling_swin import SwinLayer, window_partition

from hf_masked.modeling.parts.patches import take, visible_indices
from hf_masked.modeling.parts.visible_swin import VisibleWindows, visible_swin_stages


def small_swin(seed: int = 0, **settings) -> SwinModel:
    """Units of 16 pixels, 4 x 4 of them: 32 x 32 to 4 x 4 tokens in windows of 4."""
    form = {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 3, 2], "num_heads": [1, 2, 2, 4]}
    torch.manual_seed(seed)
    model = SwinModel(SwinConfig(**form | {"window_size": 4} | settings), add_pooling_layer=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def mask_of(grid: tuple[int, int], masked: int, batch: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, grid[0] * grid[1], generator=generator).argsort(dim=1) < masked


def stock_stages_without(backbone: SwinModel, pixel_values, mask, grid) -> list[torch.Tensor]:
    """All tokens of the stages of transformers' Swin, with masked tokens switched off as keys in every window."""

    def attention_mask(layer, visible, height, width, dtype, device):
        rows, columns = visible.shape[1:]
        visible = F.pad(visible, (0, width - columns, 0, height - rows), value=True)
        visible = window_partition(layer.cyclic_shift(visible.unsqueeze(-1)), layer.window_size).flatten(1)
        shifted = SwinLayer.get_attn_mask(layer, height, width, dtype, device)
        keys = torch.where(visible, 0.0, -1e9)[:, None, :]  # (batch * windows, 1, slots)
        return keys.expand(-1, keys.shape[-1], -1) + (0 if shifted is None else shifted.repeat(len(mask), 1, 1))

    outputs = []
    for number, stage in enumerate(backbone.encoder.layers):
        side = 2 ** (len(backbone.encoder.layers) - 1 - number)
        visible = ~mask.unflatten(1, grid).repeat_interleave(side, 1).repeat_interleave(side, 2)
        for layer in stage.blocks:
            layer.get_attn_mask = partial(attention_mask, layer, visible)
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    backbone(pixel_values, interpolate_pos_encoding=True)
    return outputs


CASES = {
    "windows divide": ({}, (64, 64)),
    "padded windows": ({"depths": [2, 2], "num_heads": [2, 4], "image_size": 40, "window_size": 4}, (40, 40)),
    "rectangles, other sizes": ({"depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 3}, (40, 64)),
    "one window high": ({"depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, (16, 64)),
    "absolute positions, no bias": ({"use_absolute_embeddings": True, "qkv_bias": False}, (64, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_stages_are_those_of_transformers_without_the_masked_tokens(case):
    settings, size = CASES[case]
    backbone, twin = small_swin(**settings), small_swin(**settings)
    stride = 2 * 2 ** (len(backbone.config.depths) - 1)
    grid = (size[0] // stride, size[1] // stride)
    pixel_values, mask = torch.randn(3, 3, *size), mask_of(grid, masked=3 * grid[0] * grid[1] // 4)
    stages = visible_swin_stages(backbone, pixel_values, visible_indices(mask), grid)
    expected = stock_stages_without(twin, pixel_values, mask, grid)
    assert len(stages) == len(expected) == len(backbone.config.depths)
    for number, ((tokens, positions, rows_and_columns), theirs) in enumerate(zip(stages, expected, strict=True)):
        assert theirs.shape[1] == rows_and_columns[0] * rows_and_columns[1]
        side = 2 ** max(0, len(stages) - 2 - number)
        assert tokens.shape[1] == positions.shape[1] == (~mask).sum(dim=1)[0] * side**2
        torch.testing.assert_close(tokens, take(theirs, positions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_everything_visible_it_is_transformers_swin(case):
    settings, size = CASES[case]
    backbone = small_swin(**settings)
    stride = 2 * 2 ** (len(backbone.config.depths) - 1)
    grid = (size[0] // stride, size[1] // stride)
    pixel_values = torch.randn(2, 3, *size)
    visible = torch.arange(grid[0] * grid[1]).expand(2, -1)
    tokens = backbone.layernorm(visible_swin_stages(backbone, pixel_values, visible, grid)[-1][0])
    expected = small_swin(**settings)(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_visible_tokens_do_not_depend_on_masked_pixels_in_any_bit():
    backbone, grid = small_swin(), (4, 4)
    mask = mask_of(grid, masked=12)
    pixel_values = torch.randn(3, 3, 64, 64)
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    stages = visible_swin_stages(backbone, pixel_values, visible_indices(mask), grid)
    for pixels in (1e4 * torch.randn_like(pixel_values), torch.full_like(pixel_values, torch.nan)):
        changed = torch.where(hidden, pixels, pixel_values)
        others = visible_swin_stages(backbone, changed, visible_indices(mask), grid)
        assert all(torch.equal(ours[0], other[0]) for ours, other in zip(stages, others, strict=True))


def test_masked_tokens_would_have_counted():
    """Without the mask the same visible tokens come out otherwise: what is tested above is not true in any case."""
    backbone, grid = small_swin(), (4, 4)
    mask, pixel_values = mask_of(grid, masked=12), torch.randn(3, 3, 64, 64)
    tokens, positions, _ = visible_swin_stages(backbone, pixel_values, visible_indices(mask), grid)[-1]
    whole = visible_swin_stages(backbone, pixel_values, torch.arange(16).expand(3, -1), grid)[-1][0]
    assert (tokens - take(whole, positions)).abs().amax(dim=(1, 2)).min() > 0.1


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_samples_do_not_touch_and_windows_without_a_visible_token_are_harmless(kernel):
    """One visible unit each, in different corners: most windows see nothing."""
    backbone, grid = small_swin(), (4, 4)
    backbone.set_attn_implementation(kernel)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 0] = mask[1, 15] = False
    pixel_values = torch.randn(2, 3, 64, 64)
    stages = visible_swin_stages(backbone, pixel_values, visible_indices(mask), grid)
    for sample in range(2):
        alone = slice(sample, sample + 1)
        single = visible_swin_stages(backbone, pixel_values[alone], visible_indices(mask[alone]), grid)
        for (tokens, _, _), (expected, _, _) in zip(stages, single, strict=True):
            torch.testing.assert_close(tokens[alone], expected, rtol=1e-5, atol=1e-5)
    backbone.layernorm(stages[-1][0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_kernels_agree():
    grid, mask, pixel_values = (4, 4), mask_of((4, 4), masked=12), torch.randn(3, 3, 64, 64)
    results = {}
    for kernel in ("sdpa", "eager"):
        backbone = small_swin()
        backbone.set_attn_implementation(kernel)
        results[kernel] = visible_swin_stages(backbone, pixel_values, visible_indices(mask), grid)[-1][0]
    torch.testing.assert_close(results["sdpa"], results["eager"], rtol=1e-4, atol=1e-5)


def test_what_a_slot_attends_to_written_out():
    """A grid of 5 x 4 in windows of 3, shifted by 1: padded to 6 x 6, whose wrapped parts stay among themselves."""
    grid, window, shift = (5, 4), 3, 1
    positions = torch.tensor([[0, 3, 5, 6, 13, 19]])
    windows = VisibleWindows(positions, grid, window, shift)
    tokens = torch.randn(1, 6, 2)
    assert torch.equal(windows.take(windows.spread(tokens, None)), tokens)
    places = [
        [(3 * i + r + shift, 3 * j + c + shift) for r in range(3) for c in range(3)] for i in (0, 1) for j in (0, 1)
    ]
    for number, slots in enumerate(places):
        for query, (row, column) in enumerate(slots):
            for key, (other_row, other_column) in enumerate(slots):
                unbroken = (row >= 6) == (other_row >= 6) and (column >= 6) == (other_column >= 6)
                place = (other_row % 6, other_column % 6)
                padding = place[0] >= 5 or place[1] >= 4
                seen = padding or place[0] * 4 + place[1] in positions[0].tolist()
                expected = (unbroken and seen) or query == key
                assert windows.attended[number, 0, query, key] == expected, (number, query, key)
