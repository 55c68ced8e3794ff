"""Changes of colour and sharpness on batches of pictures, on any device, with kornia's functional operators.

Each sample's strength comes from its own uniform numbers (see `hf_masked.randomness`), which kornia's augmentation
classes, drawing from torch's global generator, could not promise.
"""

from dataclasses import asdict, dataclass, fields

import torch

from hf_masked.randomness import Draw

# MoCo v2's (Chen et al., arXiv 2003.04297; `main_moco.py --aug-plus`), which SimSiam takes as they are.
MOCO_V2 = {
    "jitter_probability": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grayscale_probability": 0.2,
    "blur_probability": 0.5,
    "blur_sigma": (0.1, 2.0),
}


@dataclass(frozen=True)
class Photometric:
    """Strengths and probabilities of the augmentations, applied in this order; the zeros switch each of them off.

    The four jitters come in a random order, each picture's its own, as in torchvision's ColorJitter.

    Args:
        jitter_probability: share of the pictures whose colours are jittered.
        brightness, contrast, saturation: a factor in [max(0, 1 - x), 1 + x] each.
        hue: a shift in [-x, x] of the full colour circle, x at most 0.5.
        grayscale_probability: share of the pictures turned to gray.
        blur_probability: share of the pictures that are blurred.
        blur_sigma: smallest and largest standard deviation of the Gaussian blur, in pixels.
        solarize_probability: share of the pictures whose values above one half are inverted.
    """

    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "blur_sigma", tuple(self.blur_sigma))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not 0.0 <= value <= 1.0:
                raise ValueError(f"photometric.{field.name} is {value}; a probability lies in [0, 1].")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"photometric.{name} is {getattr(self, name)}; a strength is at least 0.")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"photometric.hue is {self.hue}; it must lie in [0, 0.5].")
        if len(self.blur_sigma) != 2 or not 0.0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"photometric.blur_sigma is {self.blur_sigma}; it must be (smallest, largest), above 0.")

    def to_dict(self) -> dict:
        return asdict(self)

    def __call__(self, pixels: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Augments a batch.

        Args:
            pixels: float (batch, channels, height, width) in [0, 1]; saturation, hue and gray act on three channels.
            draw: source of uniform numbers; how many are taken does not depend on the settings.
        """
        numbers = draw(13)
        choose_jitter, choose_gray, choose_blur, sigma, choose_solarize = numbers[:, [0, 5, 6, 7, 8]].unbind(dim=1)
        if self.jitter_probability:
            jittered = self._jitter(pixels, strengths=numbers[:, 1:5], order=numbers[:, 9:])
            pixels = _where(choose_jitter < self.jitter_probability, jittered, pixels)
        if self.grayscale_probability and pixels.shape[1] == 3:
            from kornia.color import rgb_to_grayscale

            gray = rgb_to_grayscale(pixels).expand_as(pixels)
            pixels = _where(choose_gray < self.grayscale_probability, gray, pixels)
        if self.blur_probability:
            pixels = _where(choose_blur < self.blur_probability, self._blur(pixels, sigma), pixels)
        if self.solarize_probability:
            solarized = torch.where(pixels < 0.5, pixels, 1.0 - pixels)
            pixels = _where(choose_solarize < self.solarize_probability, solarized, pixels)
        return pixels

    def _jitter(self, pixels, strengths, order):
        """Brightness, contrast, saturation and hue, those that are on, from the smallest number in `order` up."""
        from kornia.enhance import (
            adjust_brightness_accumulative,
            adjust_contrast_with_mean_subtraction,
            adjust_hue,
            adjust_saturation_with_gray_subtraction,
        )

        brightness, contrast, saturation, hue = strengths.unbind(dim=1)
        jitters = [
            (self.brightness, adjust_brightness_accumulative, _factor(brightness, self.brightness)),
            (self.contrast, adjust_contrast_with_mean_subtraction, _factor(contrast, self.contrast)),
        ]
        if pixels.shape[1] == 3:
            jitters += [
                (self.saturation, adjust_saturation_with_gray_subtraction, _factor(saturation, self.saturation)),
                (self.hue, adjust_hue, (2 * hue - 1) * self.hue * 2 * torch.pi),
            ]
        active = [number for number, (strength, _, _) in enumerate(jitters) if strength]
        turns = order[:, active].argsort(dim=1, stable=True)  # (batch, active): whose turn it is
        for turn in turns.unbind(dim=1):
            # Every jitter acts on the whole batch: picking rows would wait for the device.
            before = pixels
            for place, number in enumerate(active):
                _, change, amount = jitters[number]
                pixels = _where(turn == place, change(before, amount), pixels)
        return pixels

    def _blur(self, pixels, sigma):
        from kornia.filters import gaussian_blur2d

        low, high = self.blur_sigma
        sigma = low + (high - low) * sigma
        size = 2 * min(round(3 * high), (min(pixels.shape[-2:]) - 1) // 2) + 1  # three deviations, inside the picture
        return gaussian_blur2d(pixels, (size, size), torch.stack([sigma, sigma], dim=1))


def _factor(number: torch.Tensor, strength: float) -> torch.Tensor:
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * number


def _where(chosen: torch.Tensor, changed: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return torch.where(chosen[:, None, None, None], changed, pixels)
