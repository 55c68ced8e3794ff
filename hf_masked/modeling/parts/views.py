"""Views of pictures or texts, one after the other or all in one batch."""

import torch

from hf_masked.modeling.parts.pooling import check_views

# Pictures, float (batch, channels, height, width), or texts, a dict of `input_ids` and `attention_mask`, int64 (batch,
# tokens).
Inputs = torch.Tensor | dict[str, torch.Tensor]


def inputs_of(
    takes_texts: bool,
    pixel_values: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
) -> Inputs:
    """What a model was given, pictures or texts; texts without an attention mask have no padding.

    Raises:
        ValueError: for what its encoder does not take.
    """
    if (input_ids is None) == takes_texts or (pixel_values is None) != takes_texts:
        wanted = "texts: `input_ids` alone" if takes_texts else "pictures: `pixel_values` alone"
        raise ValueError(f"The encoder takes {wanted}, with the views outermost after the batch.")
    if not takes_texts:
        return pixel_values
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
    }


def split_views(inputs: Inputs, num_views: int) -> list[Inputs]:
    """The views, which stand outermost after the batch, one by one.

    Raises:
        ValueError: for another rank or number of views.
    """
    if isinstance(inputs, torch.Tensor):
        check_views(inputs, num_views)
        return list(inputs.unbind(dim=1))
    for name, value in inputs.items():
        if value.ndim != 3 or value.shape[1] != num_views:
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}; expected (batch, {num_views}, tokens): {num_views} views "
                f"of each text, as TextProcessor(num_views={num_views}) makes them in training."
            )
    return [{name: value[:, view] for name, value in inputs.items()} for view in range(num_views)]


def joined(views: list[Inputs]) -> Inputs:
    """All views in one batch, one view after the other: (views * batch, ...)."""
    if isinstance(views[0], torch.Tensor):
        return torch.cat(views)
    return {name: torch.cat([view[name] for view in views]) for name in views[0]}
