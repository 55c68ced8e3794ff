"""Relative position tables in the forms that fine-tuning wants, and what stock BEiT does with its own."""

import pytest
import torch
from transformers import BeitConfig, BeitModel, SwinConfig, SwinModel

from hf_masked.modeling.parts.relative_positions import beit_for_finetuning, swin_with_window

TABLE = "relative_position_bias_table"


def filled_tables(model):
    """The model with random tables, which start at zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(TABLE):
            torch.nn.init.normal_(parameter)
    return model.eval()


def beit(**settings) -> BeitModel:
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "use_mean_pooling": False,
    }
    return filled_tables(BeitModel(BeitConfig(**config | settings), add_pooling_layer=False))


def swin(**settings) -> SwinModel:
    torch.manual_seed(0)
    config = {"image_size": 48, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    return filled_tables(SwinModel(SwinConfig(**config | settings), add_pooling_layer=False))


@pytest.mark.parametrize("both", [False, True])
def test_a_table_per_block_leaves_the_tokens_as_they_were(both):
    shared = beit(use_shared_relative_position_bias=True, use_relative_position_bias=both)
    tuned = beit_for_finetuning(shared)
    assert tuned.shared_position_bias is None and tuned.config.use_mean_pooling and not tuned.training
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = shared(pixel_values).last_hidden_state
    torch.testing.assert_close(shared.layernorm(tuned(pixel_values).last_hidden_state), expected)
    tables = [layer.relative_position_bias.relative_position_bias_table for layer in tuned.layers]
    assert tables[0] is not tables[1] and not torch.equal(expected, beit_for_finetuning(beit())(pixel_values)[0])
    assert shared.config.use_shared_relative_position_bias, "the model that was given stays as it was"


def test_pooling_is_the_normed_mean_of_the_patches():
    tuned = beit_for_finetuning(beit(use_shared_relative_position_bias=True))
    output = tuned(torch.randn(2, 3, 32, 32))
    mean = output.last_hidden_state[:, 1:].mean(dim=1)
    torch.testing.assert_close(output.pooler_output, torch.nn.functional.layer_norm(mean, (32,), eps=1e-12))


def test_table_for_the_same_window_is_the_same():
    model = swin(window_size=6)
    same = swin_with_window(model, 6, 48)
    for name, value in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
    # Stock BEiT interpolates its table in every forward, at its own size too.
    stock = beit(use_shared_relative_position_bias=True).shared_position_bias
    index = stock.generate_relative_position_index((4, 4)).view(-1)
    expected = stock.relative_position_bias_table[index].view(17, 17, 2).permute(2, 0, 1)
    assert torch.equal(stock((4, 4))[0], expected)


def test_window_of_6_becomes_one_of_7():
    model = swin(window_size=6)
    tables = [value for name, value in model.named_parameters() if name.endswith(TABLE)]
    with torch.no_grad():
        for table in tables:  # smooth, so that interpolation has something to be right about
            across = torch.linspace(-1, 1, 11)
            table.copy_((across[:, None] + 2 * across[None, :]).view(-1, 1).expand(-1, 2))
    larger = swin_with_window(model, 7, 56)
    assert larger.config.window_size == 7 and larger.config.image_size == 56 and model.config.window_size == 6
    across = torch.linspace(-1, 1, 13)
    expected = (across[:, None] + 2 * across[None, :]).view(-1, 1)
    for name, value in larger.named_parameters():
        if name.endswith(TABLE):
            assert value.shape == (169, 2) and (value - expected).abs().max() < 0.15, name
        else:
            assert torch.equal(value, model.state_dict()[name]), name
    assert larger(torch.randn(1, 3, 56, 56)).last_hidden_state.isfinite().all()


def test_stock_beit_mixes_up_rows_and_columns_of_rectangles():
    """Why SimMIM's card advises against rectangles with BEiT; when this fails, transformers has mended it and the
    card's line must go."""
    stock = beit(image_size=(32, 16), use_shared_relative_position_bias=True).shared_position_bias
    index = stock.generate_relative_position_index((4, 2)).view(-1)
    expected = stock.relative_position_bias_table[index].view(9, 9, 2).permute(2, 0, 1)
    assert not torch.allclose(stock((4, 2))[0], expected), "mended upstream: take the card's line out"
