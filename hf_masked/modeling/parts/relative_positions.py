"""Relative position tables of stock BEiT and Swin, in the forms that fine-tuning wants."""

import copy

from transformers import PreTrainedModel

from hf_masked.modeling.parts.position_embeddings import interpolate_positions

TABLE = "relative_position_bias_table"


def beit_for_finetuning(backbone: PreTrainedModel) -> PreTrainedModel:
    """A stock BEiT as BEiT and SimMIM fine-tune it: a table in every block, and mean pooling.

    Every block starts from the table that all blocks shared in pretraining (SimMIM, `remap_pretrained_keys_vit`). With
    mean pooling, stock BEiT has its final norm, a new one, after the pooling (`fc_norm` there).

    Args:
        backbone: a BEiT in whichever form; it stays as it is. Tables for another picture size need no help: stock BEiT
            interpolates them as it runs.

    Returns:
        A `BeitModel` whose tokens, before the final norm, are those of `backbone`.
    """
    config = copy.deepcopy(backbone.config)
    weights = {name: value for name, value in backbone.state_dict().items() if not name.startswith("layernorm.")}
    shared = weights.pop(f"shared_position_bias.{TABLE}", None)
    if shared is not None:
        tables = [f"layers.{layer}.relative_position_bias.{TABLE}" for layer in range(config.num_hidden_layers)]
        weights |= {name: shared + weights.get(name, 0.0) for name in tables}
        config.use_shared_relative_position_bias, config.use_relative_position_bias = False, True
    config.use_mean_pooling = True
    tuned = type(backbone)(config)
    pooler = {f"pooler.{name}": value for name, value in tuned.pooler.state_dict().items()}
    tuned.load_state_dict(pooler | weights)
    return tuned.train(backbone.training)


def swin_with_window(backbone: PreTrainedModel, window_size: int, image_size: int) -> PreTrainedModel:
    """A stock Swin for another window, such as 7 at 224 px after pretraining with 6 at 192 px (SimMIM, appendix).

    Args:
        backbone: a Swin without absolute positions; it stays as it is.
        window_size: of the new model, in tokens.
        image_size: of the new model, in pixels.

    Returns:
        A model of the same class with the tables interpolated bicubically and all other weights copied.
    """
    config = copy.deepcopy(backbone.config)
    config.window_size, config.image_size = window_size, image_size
    grids = [(2 * window - 1,) * 2 for window in (backbone.config.window_size, window_size)]
    weights = {
        name: interpolate_positions(value.unsqueeze(0), *grids).squeeze(0) if name.endswith(TABLE) else value
        for name, value in backbone.state_dict().items()
    }
    resized = type(backbone)(config, add_pooling_layer=backbone.pooler is not None)
    resized.load_state_dict(weights)
    return resized.train(backbone.training)
