"""Clips of videos."""

import torch

from hf_masked.data.labelled import balanced_order
from hf_masked.data.video import VideoDataset, VideoFiles, load_videos
from hf_masked.evaluation.features import evaluation_mode, gathered
from hf_masked.training.modalities import Modality
from hf_masked.training.visualization import clip_grid

# Clips that are encoded at the same time for the probes, and that are drawn.
CHUNK, SHOWN = 32, 3


class Videos(Modality):
    """Samples of the probes and of pictures are the middle clips of videos, prepared."""

    def open(self, data, split, config, processor):
        if data.streaming:
            raise ValueError("Videos are read from files as they are needed; leave out --streaming.")
        return load_videos(data.dataset_name, split)

    def training_set(self, source, processor, args, data, config):
        return VideoDataset(source, processor, args.seed)

    def shown(self, source, processor, data, config, count):
        return _prepared(source, processor, range(min(count, SHOWN, len(source))))

    def from_files(self, paths, processor, config, count):
        source = VideoFiles(paths)
        return _prepared(source, processor, range(min(count, len(source))))

    def picture(self, model, processor, samples):
        panels = model.pictures(processor.picture_inputs(samples))
        panels = {name: processor.denormalize(panel).cpu() for name, panel in panels.items()}
        return clip_grid(panels, clips=len(samples))

    def labelled(self, source, processor, config, limit=None, seed=0):
        labels = source.labels()
        if labels is None:
            return None
        chosen = balanced_order(labels, seed)[:limit]
        return _prepared(source, processor, chosen.tolist()), labels[chosen]

    def features(self, model, processor, samples, device) -> torch.Tensor:
        """The mean of the tubelets' tokens."""
        with evaluation_mode(model), torch.no_grad(), gathered(model):
            return torch.cat([self._means(model, processor, clips.to(device)) for clips in samples.split(CHUNK)])

    @staticmethod
    def _means(model, processor, clips: torch.Tensor) -> torch.Tensor:
        pixel_values = processor.picture_inputs(clips)
        grid = model._check_inputs(pixel_values, None)
        return model.encode(pixel_values, None, grid)[:, 1:].mean(dim=1).float().cpu()


def _prepared(source, processor, indices) -> torch.Tensor:
    """uint8 (n, frames, channels, height, width): the middle clips of some videos, bad ones replaced."""
    dataset = VideoDataset(source, processor, training=False)
    return dataset.__getitems__([(0, index) for index in indices])["pixels"]


MODALITY = Videos()
