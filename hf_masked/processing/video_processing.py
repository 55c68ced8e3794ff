"""The processor of clips: videos in, `pixel_values` and masks out.

In two halves, as those of pictures: `prepare` chooses frames, decodes them, and cuts and resizes all frames of a clip
in one call, in workers; `finish` flips, normalises and masks per batch, on the device.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature

from hf_masked.processing import views
from hf_masked.processing.decoding import BadImageError, to_channels, to_uint8_tensor
from hf_masked.processing.image_processing import MASK, MaskedImageProcessor
from hf_masked.processing.masks import PLANE_MASKS
from hf_masked.processing.video_decoding import Video, open_video
from hf_masked.randomness import keyed_draw, sample_keys

BILINEAR = int(Image.Resampling.BILINEAR)


class MaskedVideoProcessor(MaskedImageProcessor):
    """Makes the inputs of masked modelling of clips.

    In training a clip begins anywhere in the video, as in mae_st's `util/decoder/decoder.py`, and has one crop and one
    flip for all its frames. Without training it is the middle of the video, in space and in time.

    Args:
        size: {"height", "width"} of `pixel_values` in pixels, or one number for a square.
        mask_unit: (frames, height, width) of a mask unit: the model's tubelet.
        num_frames: of a clip.
        sampling_rate: frames from one of a clip to the next, in videos of `target_fps` frames per second; a clip spans
            sampling_rate * num_frames of them. In others it is as long in seconds.
        target_fps: see there; None, and videos whose rate nobody knows, count their own frames.
        repeated_samples: clips that a video gives in training, from one decoding.
        crop_scale, crop_ratio, flip_probability: of the random crop and flip, see `PretrainingImageProcessor`.
        resample: Pillow's number of the filter: 2, bilinear, or 3, bicubic.
        antialias: whether the filter grows with the reduction; mae_st's does not.
        image_mean, image_std: mae_st's, not ImageNet's.
        kwargs: of `MaskedImageProcessor`.
    """

    # Without a default on the class, transformers would leave None out when saving, and 30 would come back.
    target_fps: float | None = 30.0

    def __init__(
        self,
        size: dict[str, int] | int | tuple[int, int] = 224,
        mask_kind: str | None = "random",
        mask_unit: tuple[int, int, int] = (2, 16, 16),
        mask_ratio: float = 0.9,
        num_frames: int = 16,
        sampling_rate: float = 4.0,
        target_fps: float | None = 30.0,
        repeated_samples: int = 1,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        resample: int = BILINEAR,
        antialias: bool = False,
        image_mean: list[float] | float | None = 0.45,
        image_std: list[float] | float | None = 0.225,
        **kwargs,
    ):
        for name, value in (("num_frames", num_frames), ("repeated_samples", repeated_samples)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name, value in (("sampling_rate", sampling_rate), ("target_fps", target_fps)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive.")
        if resample not in views.TORCH_FILTERS:
            raise ValueError(f"resample is {resample}; clips are resized by 2 (bilinear) or 3 (bicubic).")
        if mask_kind in PLANE_MASKS:
            raise ValueError(f"mask_kind is {mask_kind!r}, a mask of pictures; take 'random', 'tube' or 'frame'.")
        if kwargs.get("photometric"):
            raise ValueError("MaskedVideoProcessor does not change colours: leave out photometric.")
        self.num_frames = num_frames
        self.sampling_rate = sampling_rate
        self.target_fps = target_fps
        self.repeated_samples = repeated_samples
        self.antialias = antialias
        super().__init__(
            size,
            mask_kind,
            list(mask_unit),
            mask_ratio,
            crop_scale=crop_scale,
            resample=resample,
            image_mean=image_mean,
            image_std=image_std,
            **kwargs,
        )

    @property
    def _masked_size(self) -> tuple[int, ...]:
        return self.num_frames, *self._target_size

    def keys_for(
        self, indices: torch.Tensor | Sequence[int], seed: int, epochs: int | torch.Tensor, purpose: int
    ) -> torch.Tensor:
        """int64 (batch,) keys of the samples' clips; with several repeated samples (batch, repeated samples)."""
        keys = super().keys_for
        if self.repeated_samples == 1:
            return keys(indices, seed, epochs, purpose)
        indices = torch.as_tensor(indices, dtype=torch.int64)
        clips = torch.arange(self.repeated_samples, device=indices.device)
        epochs = epochs[:, None] if isinstance(epochs, torch.Tensor) and epochs.ndim else epochs
        return sample_keys(seed, epochs, indices[:, None], view=clips, purpose=purpose)

    def prepare(self, videos: list, keys: torch.Tensor | None = None) -> torch.Tensor:
        """First half: videos to equally sized clips.

        Args:
            videos: what `open_video` takes: paths of files or of folders of frames, uint8 arrays, lists of pictures.
            keys: int64 of `keys_for(..., CROP)` for random clips and crops; None for the middle.

        Returns:
            uint8 (batch, frames, channels, height, width) on the CPU; with keys of several repeated samples (batch,
            repeated samples, frames, ...).

        Raises:
            BadImageError: for a video that cannot be decoded.
        """
        clips = [self._clips(open_video(video), None if keys is None else keys[i]) for i, video in enumerate(videos)]
        return torch.stack(clips)

    def _clips(self, video: Video, keys: torch.Tensor | None) -> torch.Tensor:
        """The clips of one video: uint8 (*keys' shape, frames, channels, height, width)."""
        draw = None if keys is None else keyed_draw(keys.flatten())
        numbers = self.frame_numbers(video, None if draw is None else draw(1)[:, 0])  # (clips, frames)
        needed, places = numbers.unique(return_inverse=True)
        frames = self._tensor(video, needed.tolist())  # (needed, channels, height, width)
        heights, widths = (torch.full((len(numbers),), side) for side in frames.shape[-2:])
        if draw is None:
            height, width = self._target_size
            boxes = views.center_crop_boxes(heights, widths, width / height, self.crop_fraction)
        else:
            boxes = views.random_resized_crop_boxes(draw, heights, widths, self.crop_scale, self.crop_ratio)
        clips = [self._resized(frames[chosen], box) for chosen, box in zip(places, boxes.tolist(), strict=True)]
        return torch.stack(clips) if keys is not None and keys.ndim else clips[0]

    def frame_numbers(self, video: Video, starts: torch.Tensor | None) -> torch.Tensor:
        """Which frames make a clip.

        Args:
            video: with its length and rate.
            starts: float (clips,) in [0, 1), where in the video clips begin; None for the middle.

        Returns:
            int64 (clips, frames), ascending; a video that is too short repeats its last frame.
        """
        rate = 1.0 if video.fps is None or self.target_fps is None else video.fps / self.target_fps
        span = self.sampling_rate * self.num_frames * rate
        room = max(video.num_frames - span, 0.0)
        starts = torch.tensor([room // 2]) if starts is None else starts * room
        steps = torch.linspace(0, span - 1, self.num_frames)
        return (starts[:, None] + steps).clamp(0, video.num_frames - 1).long()

    def _tensor(self, video: Video, numbers: list[int]) -> torch.Tensor:
        try:
            frames = [to_channels(frame, self.num_channels) for frame in video.frames(numbers)]
            frames = [to_uint8_tensor(frame) if isinstance(frame, Image.Image) else frame for frame in frames]
        except BadImageError as error:
            message = str(error)
            raise BadImageError(message if video.name in message else f"{video.name}: {message}") from error
        if len({frame.shape for frame in frames}) > 1:
            raise BadImageError(f"{video.name}: frames of several sizes")
        return torch.stack(frames)

    def _resized(self, frames: torch.Tensor, box: list[int]) -> torch.Tensor:
        """uint8 (frames, channels, height, width), cut and resized in one call."""
        top, left, height, width = box
        crop = frames[..., top : top + height, left : left + width]
        if crop.shape[-2:] == self._target_size:
            return crop
        mode = views.TORCH_FILTERS[self.resample]
        return torch.nn.functional.interpolate(crop, size=self._target_size, mode=mode, antialias=self.antialias)

    def finish(
        self, pixels: torch.Tensor, augment_keys: torch.Tensor | None = None, mask_keys: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Second half: uint8 to the model's inputs, on the device of `pixels`.

        Args:
            pixels: uint8 (batch, frames, channels, height, width) or (batch, repeated samples, frames, ...), from
                `prepare`.
            augment_keys: int64 of `keys_for(..., AUGMENT)`, for flips; None for none.
            mask_keys: int64, one for each clip, for the masks; None for no mask.

        Returns:
            pixel_values: float32, of the shape of `pixels`, normalised.
            bool_masked_pos: bool (batch, tubelets) or (batch, repeated samples, tubelets), True = masked, time
                slowest, where a mask was asked for.
        """
        leading = pixels.shape[:-4]
        flat = [None if keys is None else keys.flatten() for keys in (augment_keys, mask_keys)]
        inputs = super().finish(pixels.flatten(0, len(leading) - 1), *flat)
        return {name: value.unflatten(0, leading) for name, value in inputs.items()}

    def _finish_keys(self, indices, seed, epochs, training):
        if training:
            return super()._finish_keys(indices, seed, epochs, training)
        return {"mask_keys": sample_keys(seed, epochs, indices, purpose=MASK)}  # one clip of each video

    def __call__(self, videos, **kwargs) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(videos, **kwargs)

    def preprocess(
        self,
        videos,
        training: bool = False,
        seed: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Both halves.

        Args:
            videos: one video or a list of them, see `prepare`; a list of frames is one video.
            training: random clips, crops and flips, several of each video with `repeated_samples`.
            seed: makes everything that is drawn a function of this number and the video's place in the list; by
                default torch's generator picks it.
            return_tensors: "pt", or "np".

        Returns:
            What `finish` returns.
        """
        if kwargs:
            raise TypeError(f"{type(self).__name__} does not know {', '.join(sorted(kwargs))}: set it when making it.")
        videos = _listed_videos(videos)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        indices = torch.arange(len(videos))
        pixels = self.prepare_training(videos, indices, seed, 0) if training else self.prepare(videos)
        return BatchFeature(self.finish(pixels, **self._finish_keys(indices, seed, 0, training)), return_tensors)

    def save_plain(self, folder: str | Path) -> None:
        """Writes the settings of transformers' `VivitImageProcessor` that treats a clip as this one does without
        training; which frames make the clip is not its matter."""
        height, width = self.size["height"], self.size["width"]
        square = height == width
        size = {"shortest_edge": round(height / self.crop_fraction)} if square else dict(self.size)
        settings = {
            "image_processor_type": "VivitImageProcessor",
            "do_resize": True,
            "size": size,
            "do_center_crop": square,
            "crop_size": dict(self.size),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "offset": False,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "resample": self.resample,
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _listed_videos(videos) -> list:
    """One video, or several in a list or an array, as a list."""
    if not isinstance(videos, list | tuple):
        several = getattr(videos, "ndim", 0) == 5
        return list(videos) if several else [videos]
    is_frame = bool(videos) and (isinstance(videos[0], Image.Image) or getattr(videos[0], "ndim", 0) in (2, 3))
    return [videos] if is_frame else list(videos)


__all__ = ["MaskedVideoProcessor"]
