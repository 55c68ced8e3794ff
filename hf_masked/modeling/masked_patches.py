"""What methods that mask patches of pictures share: the settings of the mask, drawing it, checks of the inputs, and
the model that returns features."""

from typing import ClassVar

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.parts.patches import check_mask, check_pixel_values, pair, visible_indices
from hf_masked.processing.masks import MASKS, make_mask, num_masked_of_kind
from hf_masked.randomness import model_draw


class MaskedPatchesConfig(VariantConfig):
    """Base of the configs of methods that mask patches.

    Args:
        mask_ratio: share of the units that are masked, in [0, 1).
        mask_kind: a name in `hf_masked.processing.masks.MASKS`.
        mask_options: further arguments of the mask function.
    """

    mask_ratio: float = 0.75
    mask_kind: str = "random"
    mask_options: dict | None = None

    def check(self) -> None:
        super().check()
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}; it must lie in [0, 1), because the encoder needs patches to see. "
                f"The paper's is {type(self).mask_ratio}."
            )
        if self.mask_kind not in MASKS:
            raise ValueError(f"mask_kind is {self.mask_kind!r}; known are {', '.join(sorted(MASKS))}.")

    @property
    def mask_unit(self) -> tuple[int, ...]:
        """(height, width) in pixels of what is masked or visible as a whole; of clips (frames, height, width)."""
        return pair(self.backbone_config.patch_size)

    def mask_arguments(self) -> dict:
        """All further arguments of the mask function, those that follow from other settings included."""
        return dict(self.mask_options or {})

    def processor_settings(self) -> dict:
        return super().processor_settings() | {
            "mask_unit": self.mask_unit,
            "mask_ratio": self.mask_ratio,
            "mask_kind": self.mask_kind,
            "mask_options": self.mask_arguments(),
        }


class MaskedPatchesModel(VariantModel):
    """Base of the models of methods that mask patches; ViTs record their hidden states and attentions."""

    config: MaskedPatchesConfig
    _no_split_modules: ClassVar[list[str]] = ["ViTLayer", "DeiTLayer", "Dinov2Layer"]
    # Recorded inside the backbone, with the backbone's own classes.
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": OutputRecorder(target_class=None),
        "attentions": OutputRecorder(target_class=None, index=1),
    }

    def _check_inputs(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None) -> tuple[int, int]:
        """The grid of units; raises a ValueError for inputs that do not fit."""
        grid = check_pixel_values(pixel_values, self.config.num_channels, self.config.mask_unit)
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, pixel_values.shape[0], grid)
        return grid

    def draw_mask(self, pixel_values, grid, noise=None, generator=None) -> torch.Tensor:
        """bool (batch, units): from `noise`, from `generator`, or as `model_draw` says."""
        draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training, generator, noise)
        return make_mask(self.config.mask_kind, draw, grid, self.config.mask_ratio, **self.config.mask_arguments())

    def _visible(self, bool_masked_pos: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """Visible indices; a compiled forward takes the count from the config instead of reading the mask."""
        config, count = self.config, None
        if torch.compiler.is_compiling():
            count = num_masked_of_kind(config.mask_kind, grid, config.mask_ratio)
        return visible_indices(bool_masked_pos, count)


class MaskedFeatures:
    """Makes a method's `...PreTrainedModel`, which says how it encodes pictures, the model that returns features:

        class MAEModel(MaskedFeatures, MAEPreTrainedModel)

    `encode(pixel_values, bool_masked_pos, grid, **kwargs)` returns what becomes `last_hidden_state`.
    """

    def __init__(self, config: MaskedPatchesConfig):
        super().__init__(config)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row where the encoder sees
                visible patches only; None for the plain backbone.
            kwargs: of the backbone's layers; `output_hidden_states`, `output_attentions`.

        Returns:
            last_hidden_state: (batch, prefix + units, hidden), the class token first; (batch, prefix + visible,
                hidden) where the encoder sees visible patches only.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        return BaseModelOutput(last_hidden_state=self.encode(pixel_values, bool_masked_pos, grid, **kwargs))
