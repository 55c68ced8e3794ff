"""Pictures whose values are tokens: values in [0, 1], and the numbers from which a model draws masks and times."""

from hf_masked.processing.image_processing import MASK, PretrainingImageProcessor
from hf_masked.randomness import keyed_draw


class PixelTokenProcessor(PretrainingImageProcessor):
    """Makes the inputs of methods that mask single values of pictures.

    Args:
        num_masks: how many maskings of a picture a model draws in one step.
        kwargs: of `PretrainingImageProcessor`; mean and deviation are 0 and 1 by default, for tokens are bytes.
    """

    model_input_names = ["pixel_values", "noise", "time_noise"]  # noqa: RUF012 (transformers' own declaration)

    def __init__(self, size=32, num_masks: int = 1, image_mean=0.0, image_std=1.0, **kwargs):
        super().__init__(size, image_mean=image_mean, image_std=image_std, **kwargs)
        self.num_masks = num_masks

    def finish(self, pixels, augment_keys=None, mask_keys=None):
        """Second half: uint8 to the model's inputs, on the device of `pixels`.

        Args:
            pixels, augment_keys: see `PretrainingImageProcessor.finish`.
            mask_keys: int64 (batch,); None for no noise.

        Returns:
            pixel_values: float32 (batch, channels, height, width), in [0, 1] with the default mean and deviation.
            noise: float32 (batch, num_masks, channels * height * width) in [0, 1).
            time_noise: float32 (batch,) in [0, 1).
        """
        inputs = super().finish(pixels, augment_keys)
        if mask_keys is None:
            return inputs
        draw = keyed_draw(mask_keys.to(pixels.device))
        units = pixels[0].numel()
        inputs["time_noise"] = draw(1)[:, 0]
        inputs["noise"] = draw(self.num_masks * units).unflatten(1, (self.num_masks, units))
        return inputs

    def _finish_keys(self, indices, seed, epochs, training):
        # Masks are drawn without training too.
        mask_keys = self.keys_for(indices, seed, epochs, MASK)
        return super()._finish_keys(indices, seed, epochs, training) | {"mask_keys": mask_keys}


__all__ = ["PixelTokenProcessor"]
