"""Cutout: a square at a random place of each training picture is set to the mean colour; the label stays.

Terrance DeVries, Graham W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
arXiv 1708.04552.
Reference implementation: https://github.com/uoguelph-mlrg/Cutout (`util/cutout.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_masked.modeling.registry import register_method
from hf_masked.modeling.regularizers import Pass, Regularizer, RegularizerConfig, check_share
from hf_masked.randomness import Draw, keyed_draw


@dataclass
class CutoutConfig(RegularizerConfig):
    """Config of Cutout.

    Args:
        length: side of the square in pixels, an even number; the paper's for 32 x 32 pixels: 16 for CIFAR-10, 8 for
            CIFAR-100, 20 for SVHN.
        num_holes: squares per picture, which may overlap.
        probability: of a picture to get them.
        contained: the square lies inside the picture as a whole; otherwise its centre does, and the border cuts it.
        fill_value: of `pixel_values` inside it; 0 is the mean colour where they are normalised.
    """

    method_name: ClassVar[str] = "cutout"
    paper_title: ClassVar[str] = "Improved Regularization of Convolutional Neural Networks with Cutout"
    paper_year: ClassVar[int] = 2017
    arxiv_id: ClassVar[str] = "1708.04552"
    reference_repository: ClassVar[str] = "https://github.com/uoguelph-mlrg/Cutout"
    masks: ClassVar[str] = "a square of each training picture"
    predicts: ClassVar[str] = "the class (supervised)"
    backbones: ClassVar[tuple[str, ...]] = ("any image classifier",)

    length: int = 16
    num_holes: int = 1
    probability: float = 1.0
    contained: bool = False
    fill_value: float = 0.0

    def check(self) -> None:
        check_share("probability", self.probability)
        if self.length < 0 or self.length % 2:
            raise ValueError(f"length is {self.length}; it must be an even number of pixels, for example 16.")
        if self.num_holes < 0:
            raise ValueError(f"num_holes is {self.num_holes}; it must be 0 or more.")


def cutout_mask(draw: Draw, size: tuple[int, int], config: CutoutConfig) -> torch.Tensor:
    """The squares of a batch of pictures.

    Args:
        draw: gives uniform numbers per picture, see `hf_masked.randomness`.
        size: (height, width) in pixels.
        config: of the squares.

    Returns:
        bool (batch, height, width), True = removed.

    Raises:
        ValueError: for a contained square that is larger than the picture.
    """
    half = config.length // 2
    if config.contained and config.length > min(size):
        raise ValueError(f"A square of {config.length} pixels is not contained in {size[0]} x {size[1]} ones.")
    applied = draw(1)[:, 0] < config.probability  # (batch,)
    removed = torch.zeros(len(applied), *size, dtype=torch.bool, device=applied.device)
    for _ in range(config.num_holes):
        inside = torch.ones_like(removed)
        for axis, (side, number) in enumerate(zip(size, draw(2).unbind(dim=1), strict=True)):
            first, places = (half, side - config.length + 1) if config.contained else (0, side)
            centre = first + (number.double() * places).long()  # (batch,)
            pixels = torch.arange(side, device=centre.device)
            # The end is exclusive, so that the side is `length`.
            within = (pixels >= centre[:, None] - half) & (pixels < centre[:, None] + half)  # (batch, side)
            inside &= within.unsqueeze(2 - axis)
        removed |= inside
    return removed & applied[:, None, None]


class Cutout(Regularizer):
    """Cuts squares out of `pixel_values`; call it on a batch of your own, or hand it to a Trainer."""

    config: CutoutConfig

    def __call__(self, pixel_values: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cuts.

        Args:
            pixel_values: float (batch, channels, height, width), augmented and normalised; it is not changed.
            keys: int64 (batch,), see `hf_masked.randomness.sample_keys`.

        Returns:
            The cut pictures, and bool (batch, height, width), True = removed.
        """
        removed = cutout_mask(keyed_draw(keys), tuple(pixel_values.shape[-2:]), self.config)
        return pixel_values.masked_fill(removed.unsqueeze(1), self.config.fill_value), removed

    def passes(self, model, inputs, targets, criterion, keys):
        cut, _ = self(inputs["pixel_values"], keys)
        yield Pass(inputs | {"pixel_values": cut}, targets, criterion)


register_method(config=CutoutConfig, method=Cutout, tiny_config=lambda: CutoutConfig(length=8))

__all__ = ["Cutout", "CutoutConfig", "cutout_mask"]
