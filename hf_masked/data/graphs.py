"""Graphs: where they come from, which of their edges are held out, and the data sets that training reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from hf_masked.data.keyed import KeyedDataset
from hf_masked.extras import torch_geometric
from hf_masked.processing.graph_processing import labels_of
from hf_masked.processing.masks.non_edges import draw_non_edges
from hf_masked.randomness import keyed_draw, sample_keys

PLANETOID = ("cora", "citeseer", "pubmed")
KARATE_CLUB = "karate_club"
SPLITS = ("train", "validation", "test")

# Shares of the edges that are held out for validation and for testing (Bandana, section 5.1).
HELD_OUT = (0.05, 0.10)

# Purposes of the draws of `split_links`, see `sample_keys`.
_ORDER, _NEGATIVES = range(2)


@dataclass
class Graph:
    """A graph with features and classes of its nodes.

    Args:
        x: float32 (nodes, features).
        edge_index: int64 (2, edges), senders and receivers.
        y: int64 (nodes,), classes; below 0 for none.
        nodes: split -> int64 places of the nodes whose classes it holds.
        name: for messages.
    """

    x: torch.Tensor
    edge_index: torch.Tensor
    y: torch.Tensor | None
    nodes: dict[str, torch.Tensor]
    name: str

    @property
    def train_mask(self) -> torch.Tensor | None:
        """bool (nodes,), where there is a split."""
        if "train" not in self.nodes:
            return None
        return torch.zeros(len(self.x), dtype=torch.bool).index_fill(0, self.nodes["train"], True)


def load_graph(name: str, cache_dir: str | None = None) -> Graph:
    """One graph.

    Args:
        name: an .npz file; "cora", "citeseer" or "pubmed", which torch-geometric downloads, with their public splits;
            or "karate_club", which it holds. A file has `edge_index` (2, edges), features as `x` (nodes, features) or
            in the parts of a CSR matrix (`x_indptr`, `x_indices`, `x_values`, `x_shape`) and, where there are classes,
            `y` (nodes,), below 0 for none, and places of nodes as `train`, `val` and `test`.
        cache_dir: where downloads are kept; by default in the user's cache.

    Raises:
        ValueError: for an unknown name or a file with something else in it.
        MissingPackageError: where torch-geometric is needed and missing.
    """
    if name.endswith(".npz"):
        return _from_npz(Path(name))
    datasets = torch_geometric("datasets") if name.lower() in (*PLANETOID, KARATE_CLUB) else None
    if datasets is None:
        raise ValueError(
            f"There is no graph {name!r}: give an .npz file, {', '.join(PLANETOID)}, which are downloaded, or "
            f"{KARATE_CLUB}."
        )
    if name.lower() == KARATE_CLUB:
        return from_data(datasets.KarateClub()[0], name)
    folder = Path(cache_dir or Path.home() / ".cache" / "hf_masked" / "graphs")
    try:
        return from_data(datasets.Planetoid(str(folder), name.capitalize())[0], name)
    except OSError as error:
        raise ValueError(
            f"{name} could not be downloaded ({str(error).splitlines()[0]}): put its files into "
            f"{folder / name.capitalize() / 'raw'}, or give an .npz file."
        ) from error


def from_data(data, name: str = "graph") -> Graph:
    """A `Data` of torch-geometric, with `train_mask`, `val_mask` and `test_mask` where it has them."""
    masks = {"train": "train_mask", "validation": "val_mask", "test": "test_mask"}
    nodes = {split: getattr(data, mask).nonzero()[:, 0] for split, mask in masks.items() if hasattr(data, mask)}
    if "train" in nodes and "test" not in nodes:  # as of the karate club, which has no test set
        nodes["test"] = (~data.train_mask).nonzero()[:, 0]
    classes = getattr(data, "y", None)
    return Graph(data.x.float(), data.edge_index, None if classes is None else classes.flatten(), nodes, name)


def _from_npz(path: Path) -> Graph:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with np.load(path, allow_pickle=False) as file:
        parts = {name: file[name] for name in file.files}
    if "edge_index" not in parts or not {"x", "x_indptr"} & parts.keys():
        raise ValueError(
            f"{path} has the arrays {', '.join(parts) or 'none'}; a graph has `edge_index` and `x`, or the parts of a "
            "CSR matrix, `x_indptr`, `x_indices`, `x_values` and `x_shape`."
        )
    x = torch.from_numpy(parts["x"] if "x" in parts else _dense(parts)).float()
    edges = torch.from_numpy(parts["edge_index"]).long()
    if x.ndim != 2 or edges.ndim != 2 or len(edges) != 2 or (edges.numel() and int(edges.max()) >= len(x)):
        raise ValueError(
            f"{path} has features of shape {tuple(x.shape)} and edges of shape {tuple(edges.shape)}; expected (nodes, "
            "features) and (2, edges) with numbers of those nodes."
        )
    names = {"train": "train", "validation": "val", "test": "test"}
    nodes = {split: torch.from_numpy(parts[key]).long() for split, key in names.items() if key in parts}
    classes = torch.from_numpy(parts["y"]).long() if "y" in parts else None
    return Graph(x, edges, classes, nodes, str(path))


def _dense(parts: dict[str, np.ndarray]) -> np.ndarray:
    rows = np.repeat(np.arange(len(parts["x_indptr"]) - 1), np.diff(parts["x_indptr"]))
    x = np.zeros(parts["x_shape"], dtype=np.float32)
    x[rows, parts["x_indices"]] = parts["x_values"]
    return x


@dataclass
class LinkSplit:
    """A graph without the edges that are held out, and these.

    Args:
        graph: what may be seen: the training edges, each in both directions.
        positive: "validation" and "test" -> int64 (2, pairs), the edges held out, each once.
        negative: likewise, as many pairs without an edge in the whole graph.
    """

    graph: Graph
    positive: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor]


def split_links(graph: Graph, held_out: Sequence[float] = HELD_OUT, seed: int = 0) -> LinkSplit:
    """Holds out edges at random, each with both of its directions; self-loops are left out altogether.

    Args:
        graph: its edges count as undirected.
        held_out: shares for validation and for testing.
        seed: the split is a function of it and of the graph.

    Raises:
        ValueError: for shares that leave nothing to train on.
    """
    validation, test = held_out
    if min(held_out) < 0 or validation + test >= 1:
        raise ValueError(f"held_out is {tuple(held_out)}; it must be two shares that leave edges to train on.")
    low, high = graph.edge_index.sort(dim=0).values
    numbers = (low * len(graph.x) + high)[low != high].unique()
    edges = torch.stack([numbers // len(graph.x), numbers % len(graph.x)])
    edges = edges[:, keyed_draw(sample_keys(seed, 0, [0], purpose=_ORDER))(len(numbers))[0].argsort()]
    counts = [int(share * len(numbers)) for share in (validation, test)]
    parts = edges.split([*counts, len(numbers) - sum(counts)], dim=1)
    both = torch.cat([edges, edges.flip(0)], dim=1)
    draw = keyed_draw(sample_keys(seed, 0, [0], purpose=_NEGATIVES))
    pairs = draw_non_edges(draw, both, len(graph.x), sum(counts)).split(counts, dim=1)
    names = SPLITS[1:]
    return LinkSplit(
        graph=replace(graph, edge_index=torch.cat([parts[2], parts[2].flip(0)], dim=1)),
        positive=dict(zip(names, parts[:2], strict=True)),
        negative={name: found[:, found[0] >= 0] for name, found in zip(names, pairs, strict=True)},
    )


class GraphDataset(KeyedDataset):
    """Whole graphs: a sample is a graph, or the part of its edges that a step predicts; a batch is one graph.

    Args:
        graphs: what `processor.prepare` takes.
        processor: a `GraphProcessor`.
        seed: the run's seed.
        device: where the graphs are kept.
    """

    resident: ClassVar[bool] = True

    def __init__(self, graphs: Sequence, processor, seed: int = 0, device: torch.device | str = "cpu"):
        self.processor, self.seed = processor, seed
        self._names = [getattr(graph, "name", f"graph {place}") for place, graph in enumerate(graphs)]
        prepared = [processor.prepare(graph) for graph in graphs]
        self._graphs = [{name: value.to(device) for name, value in graph.items()} for graph in prepared]
        parts = [processor.parts(graph) for graph in prepared]
        self._samples = [(place, part) for place, count in enumerate(parts) for part in range(count)]

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int, epoch: int = 0) -> str:
        return self._names[self._samples[index][0]]

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epochs, indices = (torch.tensor(part) for part in zip(*keys, strict=True))
        chosen = [self._samples[index] for index in indices.tolist()]
        samples = [self._graphs[place] | {"part": part} for place, part in chosen]
        raw = self.processor.prepare_training(samples, indices, self.seed, epochs)
        return {self.processor.raw_name: raw, "indices": indices, "epoch": epochs[0], "bad": []}


class NodeDataset(KeyedDataset):
    """Nodes as rows of features that have been filtered before, for methods whose filter learns nothing.

    Args:
        propagated_x: float32 (nodes, features).
        labels: int64 (nodes,), classes.
        processor: a `GraphProcessor`.
        name: of the graph.
        device: where they are kept.
    """

    resident: ClassVar[bool] = True

    def __init__(
        self,
        propagated_x: torch.Tensor,
        labels: torch.Tensor,
        processor,
        name: str = "graph",
        device: torch.device | str = "cpu",
    ):
        self.processor, self._name = processor, name
        self._rows, self._labels = propagated_x.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, index: int, epoch: int = 0) -> str:
        return f"node {index} of {self._name}"

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        epochs, indices = (torch.tensor(part) for part in zip(*keys, strict=True))
        raw = {"propagated_x": self._rows[indices.to(self._rows.device)]}
        return {
            self.processor.raw_name: raw,
            "indices": indices,
            "epoch": epochs[0],
            "bad": [],
            "targets": self._labels[indices.to(self._labels.device)],
        }


def collate_graphs(graphs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`Trainer(data_collator=...)` for data sets of graphs, dicts of `x`, `edge_index` and, where there are classes,
    `labels`: the graphs of a batch become one whose parts are not connected."""
    sizes = torch.tensor([len(graph["x"]) for graph in graphs])
    starts = (sizes.cumsum(0) - sizes).tolist()
    moved = [graph["edge_index"] + start for graph, start in zip(graphs, starts, strict=True)]
    batch = {name: torch.cat([graph[name] for graph in graphs]) for name in graphs[0] if name != "edge_index"}
    return batch | {"edge_index": torch.cat(moved, dim=1)}


def labelled_nodes(graph: Graph, split: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """int64 places and classes of the nodes of a split that have a class; None where there are none."""
    classes = labels_of(graph)
    if classes is None or split not in graph.nodes:
        return None
    nodes = graph.nodes[split]
    nodes = nodes[classes[nodes] >= 0]
    return nodes, classes[nodes]


__all__ = [
    "HELD_OUT",
    "Graph",
    "GraphDataset",
    "LinkSplit",
    "NodeDataset",
    "collate_graphs",
    "from_data",
    "labelled_nodes",
    "load_graph",
    "split_links",
]
