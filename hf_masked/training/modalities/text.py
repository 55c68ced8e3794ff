"""Texts: blocks of tokens, single texts, rows of several, triplets drawn by class."""

import torch

from hf_masked.data.labelled import balanced_order
from hf_masked.data.sets import make_sets
from hf_masked.data.text import TextBlocks, TextDataset, load_texts
from hf_masked.evaluation.features import evaluation_mode, gathered
from hf_masked.modeling.parts.pooling import pool_tokens
from hf_masked.training.modalities import Modality

# Texts per forward pass of a probe.
BATCH = 64


class Texts(Modality):
    """Of methods that mask tokens (`config.sample == "block"`) the samples are blocks cut from all texts."""

    def open(self, data, split, config, processor):
        if data.streaming:
            raise ValueError("Texts cannot be streamed: leave out --streaming.")
        return load_texts(
            data.dataset_name,
            split,
            config_name=data.dataset_config_name,
            text_column=data.text_column,
            label_column=data.label_column,
            cache_dir=data.data_cache_dir,
        )

    def training_set(self, source, processor, args, data, config):
        if config.sample == "block":
            return TextDataset(TextBlocks(source, processor), processor, args.seed)
        if source.texts_per_row > 1:  # which belong together already
            return TextDataset(source, processor, args.seed)
        return TextDataset(source, processor, args.seed, sets=make_sets(config.sample, source))

    def labelled(self, source, processor, config, limit=None, seed=0):
        labels = source.labels()
        if labels is None or source.texts_per_row > 1:
            return None
        order = torch.arange(len(labels)) if limit is None else balanced_order(labels, seed)
        order = order[labels[order] >= 0][:limit]
        return [source.sample(number) for number in order.tolist()], labels[order]

    @torch.no_grad()
    def features(self, model, processor, samples, device) -> torch.Tensor:
        encoder = model.backbone.to(device)
        features = []
        with evaluation_mode(encoder), gathered(model):
            for start in range(0, len(samples), BATCH):
                tokens = {name: value.to(device) for name, value in processor(samples[start : start + BATCH]).items()}
                hidden = encoder(**tokens).last_hidden_state
                features.append(pool_tokens(hidden, tokens["attention_mask"]).float().cpu())
        return torch.cat(features)


MODALITY = Texts()
