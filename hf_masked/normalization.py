"""How pictures are normalised where nothing else is said: alike in processors, in models and in evaluation."""

from collections.abc import Sequence

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mean_and_std(
    image_mean: float | Sequence[float] | None, image_std: float | Sequence[float] | None, num_channels: int
) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, for values in [0, 1].

    Args:
        image_mean, image_std: one number per channel, or one for all; by default ImageNet's for three channels and 0.5
            for others.
        num_channels: of the pictures.

    Raises:
        ValueError: for another count of numbers.
    """
    return (
        _per_channel("image_mean", image_mean, IMAGENET_MEAN, num_channels),
        _per_channel("image_std", image_std, IMAGENET_STD, num_channels),
    )


def _per_channel(name: str, values, imagenet: tuple[float, ...], num_channels: int) -> list[float]:
    if values is None:
        values = imagenet if num_channels == 3 else 0.5
    values = [float(values)] if isinstance(values, int | float) else [float(value) for value in values]
    if len(values) == 1:
        values *= num_channels
    if len(values) != num_channels:
        raise ValueError(
            f"{name} has {len(values)} values for num_channels={num_channels}: give one number, or one per channel."
        )
    return values


__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "mean_and_std"]
