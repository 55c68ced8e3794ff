"""Point clouds."""

import torch

from hf_masked.data.folders import files_below
from hf_masked.data.labelled import balanced_order
from hf_masked.data.points import ARRAYS, MESHES, PointCloudDataset, load_points, read_cloud
from hf_masked.evaluation.features import evaluation_mode, gathered
from hf_masked.training.modalities import Modality
from hf_masked.training.visualization import scatter_grid

# Clouds that an encoder sees at once.
BATCH = 64


class PointClouds(Modality):
    """Single clouds."""

    def open(self, data, split, config, processor):
        if data.streaming:
            raise ValueError(
                "Point clouds are read from files of a folder and cannot be streamed: leave out --streaming."
            )
        return load_points(data.dataset_name, split)

    def training_set(self, source, processor, args, data, config):
        return PointCloudDataset(source, processor, args.seed, max_bad_share=args.max_bad_share)

    def shown(self, source, processor, data, config, count):
        dataset = PointCloudDataset(source, processor, training=False)
        return dataset.__getitems__([(0, index) for index in range(min(count, len(dataset)))])[processor.raw_name]

    def from_files(self, paths, processor, config, count):
        files = [path / name for path in paths if path.is_dir() for name in files_below(path)]
        files += [path for path in paths if not path.is_dir()]
        files = [file for file in files if file.suffix.lower() in (*ARRAYS, *MESHES)][:count]
        if not files:
            raise ValueError(
                f"There is no point cloud ({', '.join((*ARRAYS, *MESHES))}) in {', '.join(map(str, paths))}."
            )
        return processor.prepare([read_cloud(file) for file in files])

    def picture(self, model, processor, samples):
        panels = {name: tuple(layer.cpu() for layer in layers) for name, layers in model.clouds(samples).items()}
        return scatter_grid(panels, rows=len(samples))

    def labelled(self, source, processor, config, limit=None, seed=0):
        labels = source.labels()
        if labels is None:
            return None
        order = torch.arange(len(labels)) if limit is None else balanced_order(labels, seed)[:limit]
        dataset = PointCloudDataset(source, processor, training=False)
        batch = dataset.__getitems__([(0, index) for index in order.tolist()])
        return batch[processor.raw_name], batch["labels"]

    def features(self, model, processor, samples, device) -> torch.Tensor:
        """Largest and mean of the patches' tokens, side by side."""
        encoder = getattr(model, "backbone", model).to(device)
        with evaluation_mode(encoder), torch.no_grad(), gathered(model):
            chunks = [encoder(chunk.to(device)).last_hidden_state.float() for chunk in samples.split(BATCH)]
        tokens = torch.cat(chunks)  # (n, groups, hidden)
        return torch.cat([tokens.amax(dim=1), tokens.mean(dim=1)], dim=1).cpu()


MODALITY = PointClouds()
