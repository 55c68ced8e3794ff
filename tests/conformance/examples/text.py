"""Texts for the conformance suite, in the samples that the variant learns from."""

import torch

from hf_masked.data.sets import make_sets
from hf_masked.data.text import TextBlocks, TextDataset, TextSource
from hf_masked.modeling.registry import Variant

WORDS = ("mask", "token", "encoder", "decoder", "view", "twin", "loss", "text", "pair", "block")


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of several words."""
    words = torch.randint(len(WORDS), (count, 6), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[number] for number in row) for row in words.tolist()]


def source(count: int, seed: int = 0) -> TextSource:
    """Random texts of four classes."""
    from datasets import Dataset

    rows = Dataset.from_dict({"text": texts(count, seed), "label": [number % 4 for number in range(count)]})
    return TextSource(rows, "random texts")


def training_data(variant: Variant, processor, count: int, seed: int = 0) -> TextDataset:
    """A data set of so many random texts, or of at least so many blocks of them."""
    if variant.config.sample == "block":
        return TextDataset(TextBlocks(source(count, seed), processor), processor, seed)
    chosen = source(count, seed)
    return TextDataset(chosen, processor, seed, make_sets(variant.config.sample, chosen))


def users_samples(variant: Variant, processor, count: int) -> dict:
    """What a user hands the processor."""
    return {"texts": texts(count)}


def encoder_inputs(processor) -> dict[str, torch.Tensor]:
    """Inputs of the plain encoder."""
    tokens = processor(texts(2))
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}
