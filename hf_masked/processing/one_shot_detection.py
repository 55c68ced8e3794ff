"""Inputs of one-shot detection: a picture, and a smaller one of what is to be found in it."""

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from hf_masked.processing.decoding import open_image, to_channels
from hf_masked.processing.views import crop_and_resize

BILINEAR = int(Image.Resampling.BILINEAR)


class OneShotDetectionProcessor(BaseImageProcessor):
    """Squeezes targets and queries to their sizes, whatever their shape, in [0, 1].

    Args:
        size: (height, width) of the targets in pixels.
        query_size: (height, width) of the queries; the method takes half of `size`.
        num_channels: of the pictures.
        resample: Pillow's number of the filter.
    """

    model_input_names = ["pixel_values", "query_pixel_values"]  # noqa: RUF012 (transformers' own declaration)

    def __init__(
        self,
        size: tuple[int, int] = (416, 416),
        query_size: tuple[int, int] = (208, 208),
        num_channels: int = 3,
        resample: int = BILINEAR,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.size, self.query_size = list(size), list(query_size)
        self.num_channels = num_channels
        self.resample = int(resample)

    def preprocess(self, images, queries, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """Makes the model's inputs.

        Args:
            images: one target or a list of them: Pillow pictures, arrays (uint8) or paths.
            queries: as many pictures of what is looked for.
            return_tensors: "pt" or "np".

        Returns:
            pixel_values: float32 (batch, channels, *size).
            query_pixel_values: float32 (batch, channels, *query_size).

        Raises:
            ValueError: for other numbers of pictures.
        """
        images, queries = (part if isinstance(part, list | tuple) else [part] for part in (images, queries))
        if len(images) != len(queries):
            raise ValueError(f"There are {len(images)} targets and {len(queries)} queries: give one query per target.")
        inputs = {
            "pixel_values": torch.stack([self.squeeze(image, self.size) for image in images]),
            "query_pixel_values": torch.stack([self.squeeze(query, self.query_size) for query in queries]),
        }
        return BatchFeature(inputs, tensor_type=return_tensors)

    def squeeze(self, image, size: list[int]) -> torch.Tensor:
        """float32 (channels, *size) in [0, 1], of a picture of any shape."""
        if isinstance(image, str):
            image = open_image(image, image)
        image = to_channels(image, self.num_channels)
        height, width = image.shape[-2:] if isinstance(image, torch.Tensor) else image.size[::-1]
        return crop_and_resize(image, (0, 0, height, width), tuple(size), self.resample).float() / 255
