"""Graphs for the conformance suite: rings of eight nodes with random features and two classes."""

import torch

from hf_masked.data.graphs import GraphDataset, NodeDataset, collate_graphs
from hf_masked.modeling.parts.graph import random_ring
from hf_masked.modeling.registry import Variant

NODES = 8


def graphs(processor, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [
            {
                "x": torch.randn(NODES, processor.num_features).exp(),
                "edge_index": random_ring(NODES),
                "y": torch.arange(NODES) % 2,
            }
            for _ in range(count)
        ]


def training_data(variant: Variant, processor, count: int, seed: int = 0) -> GraphDataset | NodeDataset:
    samples = graphs(processor, count, seed)
    if variant.config.sample == "graph":
        return GraphDataset(samples, processor, seed)
    rows = torch.cat([processor.prepare(graph)["x"] for graph in samples])[:count]
    return NodeDataset(rows, torch.arange(count) % 2, processor)


def users_samples(variant: Variant, processor, count: int) -> dict:
    return {"graphs": graphs(processor, count)}


def encoder_inputs(processor) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(NODES, processor.num_features), "edge_index": random_ring(NODES)}


def plain_samples(variant: Variant, processor, count: int) -> tuple[list, object]:
    """Samples and the collator for the plain Trainer."""
    samples = [processor(graph) for graph in graphs(processor, count)]
    return [dict(sample) for sample in samples], collate_graphs
