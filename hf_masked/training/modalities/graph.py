"""Graphs: one that a method sees whole, or its nodes as rows of filtered features (`config.sample == "node"`)."""

from dataclasses import dataclass, replace

import torch
from transformers import AutoModel

from hf_masked.data.graphs import (
    HELD_OUT,
    SPLITS,
    Graph,
    GraphDataset,
    LinkSplit,
    NodeDataset,
    labelled_nodes,
    load_graph,
    split_links,
)
from hf_masked.evaluation.graphs import link_prediction, node_accuracy
from hf_masked.training.callbacks import EpochIntervalCallback
from hf_masked.training.modalities import Modality

# As many training nodes the online kNN looks at; a graph with fewer labels has no such probe.
NEIGHBOURS = 20


@dataclass
class GraphSource:
    """A graph, and the split of its nodes that is meant."""

    graph: Graph
    split: str

    @property
    def name(self) -> str:
        return self.graph.name


@dataclass
class NodeSamples:
    """Some nodes of a graph: what encoders are given to make features of them."""

    inputs: dict[str, torch.Tensor]
    nodes: torch.Tensor

    def __getitem__(self, places) -> "NodeSamples":
        return replace(self, nodes=self.nodes[places])


class LinkCallback(EpochIntervalCallback):
    """Logs how well the edges that are held out are told from pairs without an edge.

    Args:
        trainer: to log with.
        split: the edges.
        every_epochs: may be a fraction; 0 for never.
    """

    def __init__(self, trainer, split: LinkSplit, every_epochs: float):
        super().__init__(every_epochs)
        self.trainer, self.split = trainer, split

    def act(self, state, model) -> None:
        figures = {
            f"{part}_{name}": round(value, 4)
            for part in self.split.positive
            if self.split.positive[part].numel()
            for name, value in link_prediction(model, self.trainer.processing_class, self.split, part).items()
        }
        self.trainer.log(figures)


class NodeAccuracyCallback(EpochIntervalCallback):
    """Logs the accuracy on nodes that the training does not see.

    Args:
        trainer: to log with.
        rows: split -> filtered features and classes.
        every_epochs: may be a fraction; 0 for never.
    """

    def __init__(self, trainer, rows: dict[str, tuple[torch.Tensor, torch.Tensor]], every_epochs: float):
        super().__init__(every_epochs)
        self.trainer, self.rows = trainer, rows

    def act(self, state, model) -> None:
        self.trainer.log(
            {f"{part}_accuracy": round(node_accuracy(model, *rows), 4) for part, rows in self.rows.items()}
        )


class Graphs(Modality):
    """The graph is read once, whole; the splits of a data set are splits of its nodes."""

    def open(self, data, split, config, processor):
        if data.streaming:
            raise ValueError("A graph cannot be streamed: leave out --streaming.")
        if split not in SPLITS:
            raise ValueError(f"A graph has no split {split!r}; the nodes have {', '.join(SPLITS)}.")
        return GraphSource(load_graph(data.dataset_name, data.data_cache_dir), split)

    def training_set(self, source, processor, args, data, config):
        if config.sample == "graph":
            graphs = GraphDataset([_link_split(source, data).graph], processor, args.seed, args.device)
            if len(graphs) < args.world_size * args.train_batch_size:
                raise ValueError(
                    f"{source.name} makes {len(graphs)} sample(s) of an epoch, the whole graph, "
                    f"and {args.world_size} processes with per_device_train_batch_size={args.train_batch_size} take "
                    f"{args.world_size * args.train_batch_size} at once: train it in one process, with a batch of 1."
                )
            return graphs
        rows = _filtered_rows(source, processor, config).get(source.split)
        if rows is None:
            raise ValueError(
                f"{source.name} has no classes of nodes for {source.split}, and {config.model_type} learns them."
            )
        if int(rows[1].max()) >= config.num_labels:
            raise ValueError(
                f"{source.name} has class {int(rows[1].max())} and the model {config.num_labels} classes, from 0: set "
                f"--model.num_labels {int(rows[1].max()) + 1}."
            )
        return NodeDataset(*rows, processor, source.name, args.device)

    def labelled(self, source, processor, config, limit=None, seed=0):
        found = labelled_nodes(source.graph, source.split) if config.sample == "graph" else None
        if found is None or len(found[0]) < NEIGHBOURS:
            return None
        nodes, classes = found
        if limit is not None and limit < len(nodes):
            chosen = torch.randperm(len(nodes), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
            nodes, classes = nodes[chosen], classes[chosen]
        return NodeSamples(processor.prepare(source.graph), nodes), classes

    @torch.no_grad()
    def features(self, model, processor, samples, device) -> torch.Tensor:
        was_training = model.training
        model.eval()
        features = model.node_features(**{name: value.to(device) for name, value in samples.inputs.items()})
        model.train(was_training)
        return features[samples.nodes.to(device)].float().cpu()

    def observers(self, trainer, source, data, config):
        every = trainer.args.probe_every_epochs
        if config.sample == "graph":
            return [LinkCallback(trainer, _link_split(source, data), every)]
        rows = _filtered_rows(source, trainer.processing_class, config)
        others = {part: rows[part] for part in rows if part != source.split}
        return [NodeAccuracyCallback(trainer, others, every)] if others else []


def _link_split(source: GraphSource, data) -> LinkSplit:
    """A function of the graph and of the shares, whatever the run's seed."""
    return split_links(source.graph, HELD_OUT if data.held_out_edges is None else data.held_out_edges)


def _filtered_rows(source: GraphSource, processor, config) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Split -> the filtered features and the classes of its nodes; the filter learns nothing, so once is enough."""
    graph_filter = AutoModel.from_config(config.backbone_config)
    rows = graph_filter(**processor.prepare(source.graph)).last_hidden_state
    found = {part: labelled_nodes(source.graph, part) for part in SPLITS}
    return {part: (rows[nodes], classes) for part, (nodes, classes) in _known(found)}


def _known(found: dict):
    return [(part, pair) for part, pair in found.items() if pair is not None and len(pair[0])]


MODALITY = Graphs()
