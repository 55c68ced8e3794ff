"""Stereo matching: how far off disparities are, and from two pictures to a disparity map and its picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# KITTI 2015: a pixel is wrong that is off by more than this many pixels, and by more than this share of the truth.
BAD_PIXELS = 3.0
BAD_SHARE = 0.05


def valid_pixels(truth: torch.Tensor, max_disparity: float | None = None) -> torch.Tensor:
    """bool, of disparities of any shape: known (above 0, finite), and below `max_disparity`, if that is given."""
    valid = (truth > 0) & truth.isfinite()
    return valid if max_disparity is None else valid & (truth < max_disparity)


def end_point_error(predicted: torch.Tensor, truth: torch.Tensor, max_disparity: float | None = None) -> float:
    """Mean absolute error in pixels over the valid pixels (Scene Flow's measure).

    Args:
        predicted, truth: float of one shape; a truth of 0 is unknown.
        max_disparity: truths of this and more are left out.

    Raises:
        ValueError: for other shapes, or without a valid pixel.
    """
    return float(_errors(predicted, truth, max_disparity)[0].mean())


def bad_pixel_rate(
    predicted: torch.Tensor, truth: torch.Tensor, threshold: float = BAD_PIXELS, max_disparity: float | None = None
) -> float:
    """Share of the valid pixels that are off by more than `threshold` pixels (KITTI 2012's 3-pixel error); arguments
    as for `end_point_error`."""
    return float((_errors(predicted, truth, max_disparity)[0] > threshold).float().mean())


def d1_error(predicted: torch.Tensor, truth: torch.Tensor, max_disparity: float | None = None) -> float:
    """Share of the valid pixels that are off by more than 3 pixels and by more than 5 % of the truth (KITTI 2015's
    D1); arguments as for `end_point_error`."""
    errors, truth = _errors(predicted, truth, max_disparity)
    return float(((errors > BAD_PIXELS) & (errors > BAD_SHARE * truth)).float().mean())


def stereo_errors(
    predicted: torch.Tensor, truth: torch.Tensor, max_disparity: float | None = None
) -> dict[str, float]:
    """All three: "end_point_error", "bad_pixel_rate" and "d1_error"."""
    return {
        "end_point_error": end_point_error(predicted, truth, max_disparity),
        "bad_pixel_rate": bad_pixel_rate(predicted, truth, max_disparity=max_disparity),
        "d1_error": d1_error(predicted, truth, max_disparity),
    }


def evaluate_pairs(matcher: "StereoMatcher", source) -> dict[str, float]:
    """Mean over the pairs of a source of `stereo_errors`, and their number.

    Args:
        matcher: see `StereoMatcher`.
        source: of `hf_masked.data.stereo.load_stereo`.
    """
    samples = [source.sample(index) for index in range(len(source))]
    errors = [stereo_errors(matcher(pair.left, pair.right).disparity, pair.disparity) for pair in samples]
    means = {name: sum(pair[name] for pair in errors) / len(errors) for name in errors[0]}
    return means | {"pairs": len(errors)}


def _errors(predicted, truth, max_disparity) -> tuple[torch.Tensor, torch.Tensor]:
    """Absolute errors and truths of the valid pixels."""
    if predicted.shape != truth.shape:
        raise ValueError(
            f"The prediction has shape {tuple(predicted.shape)} and the truth {tuple(truth.shape)}: they must be of "
            "one size; post_process_stereo_matching brings predictions to that of the pictures."
        )
    valid = valid_pixels(truth, max_disparity)
    if not valid.any():
        raise ValueError("The truth has no valid pixel: 0 means unknown.")
    truth = truth[valid].double()
    return (predicted[valid].double() - truth).abs(), truth


@dataclass
class StereoMatch:
    """The disparity of a pair.

    Args:
        disparity: float32 (height, width) of the left picture, in pixels.
    """

    disparity: torch.Tensor

    def picture(self, largest: float | None = None) -> Image.Image:
        """The map in colours, dark for far and bright for near, with their scale in pixels.

        Args:
            largest: disparity of the brightest colour; by default the largest there is.
        """
        from hf_masked.training.visualization import disparity_picture

        return disparity_picture(self.disparity, largest)

    def save(self, path: str | Path) -> None:
        """Writes the disparities as KITTI does: a PNG of 16 bits, value = 256 * disparity, 0 = unknown."""
        values = (256 * self.disparity).round().clamp(0, 65535).numpy().astype(np.uint16)
        Image.fromarray(values).save(path)


class StereoMatcher:
    """From two pictures to a disparity map, as a pipeline does; the pipelines of transformers take one picture.

    Args:
        model: a stereo matching model of this package.
        processor: its `StereoImageProcessor`.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, checkpoint: str) -> "StereoMatcher":
        """Of a folder or Hub id.

        Raises:
            ValueError: for a model of another kind.
        """
        from transformers import AutoConfig, AutoModelForPreTraining

        import hf_masked

        config = AutoConfig.from_pretrained(checkpoint)
        if getattr(config, "sample", None) != "stereo":
            raise ValueError(f"{checkpoint} is a {config.model_type}, which matches no stereo pairs: psmnet does.")
        processor = hf_masked.StereoImageProcessor.from_pretrained(checkpoint)
        return cls(AutoModelForPreTraining.from_pretrained(checkpoint), processor)

    @torch.inference_mode()
    def __call__(self, left, right) -> StereoMatch:
        """Matches a rectified pair.

        Args:
            left, right: pictures of one size, of any kind that the processor takes, file names included; the left
                pixel x is the right one's x - disparity.
        """
        size = self.processor.picture_size(left)
        pixel_values = self.processor([left, right])["pixel_values"].to(self.model.device)
        outputs = self.model(pixel_values)
        found = self.processor.post_process_stereo_matching(outputs, [size])[0]
        return StereoMatch(found["predicted_disparity"].float().cpu())


__all__ = [
    "StereoMatch",
    "StereoMatcher",
    "bad_pixel_rate",
    "d1_error",
    "end_point_error",
    "evaluate_pairs",
    "stereo_errors",
    "valid_pixels",
]
