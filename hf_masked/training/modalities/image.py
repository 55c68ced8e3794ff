"""Pictures, and sets of them: views, pairs, triplets, frames of clips, stereo pairs."""

import torch

from hf_masked.data import ImageDataset, ResidentImageDataset, StreamingImageDataset, labelled_tensors, load_images
from hf_masked.data.folders import readable_pictures
from hf_masked.data.sets import make_sets
from hf_masked.data.stereo import StereoDataset, load_stereo
from hf_masked.evaluation.features import extract_features
from hf_masked.training.modalities import Modality
from hf_masked.training.visualization import picture_grid


class Images(Modality):
    """Of stereo matching (`config.sample == "stereo"`) the sources are pairs with disparities."""

    def open(self, data, split, config, processor):
        if config.sample == "stereo":
            size = (processor.size["height"], processor.size["width"])
            return load_stereo(data.dataset_name, split, size, config.max_disparity, config.num_channels)
        return load_images(
            data.dataset_name,
            split,
            config_name=data.dataset_config_name,
            image_column=data.image_column,
            label_column=data.label_column,
            streaming=data.streaming and split == data.train_split,
            cache_dir=data.data_cache_dir,
        )

    def training_set(self, source, processor, args, data, config):
        """Resident on the device where that is asked for or natural, else read by workers, or in passing."""
        if data.streaming and config.sample != "picture":
            raise ValueError(
                f"This method learns from samples of several pictures ({config.sample}), which cannot be streamed: "
                "leave out --streaming."
            )
        if data.streaming:
            shares = {"rank": args.process_index, "world_size": args.world_size}
            return StreamingImageDataset(source, processor, args.seed, **shares)
        if config.sample == "stereo":
            return StereoDataset(source, processor, args.seed)
        sets = make_sets(config.sample, source, data.frame_gap)
        settings = {"max_bad_share": args.max_bad_share, "sets": sets}
        resident = source.as_tensor() is not None if args.resident_data is None else args.resident_data
        if resident:
            return ResidentImageDataset(source, processor, args.seed, device=args.device, **settings)
        return ImageDataset(source, processor, args.seed, **settings)

    def shown(self, source, processor, data, config, count):
        if config.sample == "stereo":
            dataset = StereoDataset(source, processor, training=False)
        else:
            sets = make_sets(config.sample, source, data.frame_gap)
            dataset = ImageDataset(source, processor, training=False, sets=sets)
        return dataset.__getitems__([(0, index) for index in range(min(count, len(dataset)))])[processor.raw_name]

    def from_files(self, paths, processor, config, count):
        size = 1 if config.sample == "picture" else processor.num_views
        pictures = list(readable_pictures(paths, count * size).values())
        if len(pictures) < size:
            raise ValueError(f"A sample of this method has {size} pictures; {len(pictures)} can be read.")
        if config.sample == "picture":
            return processor.prepare(pictures)
        starts = range(0, len(pictures) - size + 1, size)  # what is left over is left out
        return processor.prepare([pictures[start : start + size] for start in starts])

    def picture(self, model, processor, samples):
        panels = model.pictures(processor.picture_inputs(samples))
        panels = {name: processor.denormalize(panel).cpu() for name, panel in panels.items()}
        return picture_grid(panels, rows=len(samples))

    def labelled(self, source, processor, config, limit=None, seed=0):
        # An encoder of stereo pairs gives maps, and the pairs have no classes.
        if config.sample == "stereo" or source.labels() is None:
            return None
        return labelled_tensors(source, processor, limit=limit, seed=seed)

    def features(self, model, processor, samples, device) -> torch.Tensor:
        return extract_features(model, samples, mean=processor.image_mean, std=processor.image_std, device=device)


MODALITY = Images()
