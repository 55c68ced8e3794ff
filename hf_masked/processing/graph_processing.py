"""The processor of graphs: features and edges in, what a model takes out.

It works in two halves, as those of pictures do. `prepare` scales the features and puts the edges in order; a graph
needs it once. `finish` draws, on the device, what a method masks of it.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from hf_masked.processing.masks.bandwidth import bandwidth_mask
from hf_masked.processing.masks.non_edges import draw_non_edges
from hf_masked.randomness import keyed_draw, sample_keys

SCALINGS = (None, "rows", "columns")

# Purposes of the draws, see `sample_keys`.
MASK, EDGE_ORDER = range(2)


class GraphProcessor(FeatureExtractionMixin):
    """Makes the inputs of methods on graphs.

    Several graphs become one whose parts are not connected.

    Args:
        num_features: of a node, which graphs are held to; None for any.
        feature_scaling: divide each node's features by their sum ("rows", for bags of words), or bring each feature to
            mean 0 and deviation 1 over the nodes of the graph ("columns"), or neither (None).
        keep_self_loops: of the graph; otherwise they are taken out.
        temperatures: of the bandwidths, one for each layer; None for methods that have none.
        negative_ratio: pairs without an edge per directed edge, where there are bandwidths.
        edges_per_step: largest number of directed edges of a graph that the loss of a step takes; a larger graph is
            several samples, each with another part of the edges to predict.
    """

    model_input_names = ["x", "edge_index", "bandwidths", "neg_edge_index", "loss_edges", "propagated_x", "labels"]  # noqa: RUF012
    # Name, in the batches of data sets, of what `prepare_training` makes.
    raw_name: ClassVar[str] = "graph"

    def __init__(
        self,
        num_features: int | None = None,
        feature_scaling: str | None = None,
        keep_self_loops: bool = False,
        temperatures: list[float] | None = None,
        negative_ratio: float = 1.0,
        edges_per_step: int = 65536,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if feature_scaling not in SCALINGS:
            raise ValueError(f"feature_scaling is {feature_scaling!r}; it must be 'rows', 'columns' or None.")
        if edges_per_step < 1:
            raise ValueError(f"edges_per_step is {edges_per_step}; it must be at least 1, for example 65536.")
        self.num_features = num_features
        self.feature_scaling = feature_scaling
        self.keep_self_loops = keep_self_loops
        self.temperatures = None if temperatures is None else [float(number) for number in temperatures]
        self.negative_ratio = negative_ratio
        self.edges_per_step = edges_per_step

    def prepare(self, graph) -> dict[str, torch.Tensor]:
        """First half: one graph in order.

        Args:
            graph: has `x`, numbers (nodes, features), and `edge_index`, (2, edges): a `Graph` of
                `hf_masked.data.graphs`, a `Data` of torch-geometric, or a dict.

        Returns:
            x: float32 (nodes, features), scaled.
            edge_index: int64 (2, edges): every edge once in each direction, sorted by receiver.

        Raises:
            ValueError: for features of another width, or edges between nodes that are not there.
        """
        x = torch.as_tensor(_field(graph, "x")).float()
        edges = torch.as_tensor(_field(graph, "edge_index")).long()
        if x.ndim != 2 or (self.num_features is not None and x.shape[1] != self.num_features):
            wanted = "features" if self.num_features is None else self.num_features
            raise ValueError(
                f"The graph's features have shape {tuple(x.shape)}; expected (nodes, {wanted}). Set "
                f"--model.backbone_config.num_features {x.shape[-1]}, or take the graph that the model was made for."
            )
        if edges.ndim != 2 or edges.shape[0] != 2:
            raise ValueError(f"`edge_index` has shape {tuple(edges.shape)}; expected (2, edges).")
        if edges.numel() and not 0 <= edges.min() <= edges.max() < len(x):
            raise ValueError(
                f"`edge_index` names nodes {int(edges.min())} to {int(edges.max())}; the graph has {len(x)}, from 0."
            )
        return {"x": self._scaled(x), "edge_index": self._ordered(edges, len(x))}

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        if self.feature_scaling == "rows":
            total = x.sum(dim=1, keepdim=True)
            return x / torch.where(total == 0, 1, total)
        if self.feature_scaling == "columns":
            deviation = x.std(dim=0)
            return (x - x.mean(dim=0)) / torch.where(deviation == 0, 1, deviation)
        return x

    def _ordered(self, edges: torch.Tensor, num_nodes: int) -> torch.Tensor:
        if not self.keep_self_loops:
            edges = edges[:, edges[0] != edges[1]]
        senders, receivers = torch.cat([edges, edges.flip(0)], dim=1)
        numbers = (receivers * num_nodes + senders).unique()
        return torch.stack([numbers % num_nodes, numbers // num_nodes])

    def parts(self, prepared: dict[str, torch.Tensor]) -> int:
        """Number of samples that a prepared graph makes: parts of its edges, each for a step of its own."""
        if self.temperatures is None:
            return 1
        return max(1, -(-prepared["edge_index"].shape[1] // self.edges_per_step))

    def prepare_training(
        self, samples: Sequence[dict[str, torch.Tensor]], indices: torch.Tensor, seed: int, epochs: int | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Prepared graphs as one; nothing is drawn yet.

        Args:
            samples: of `prepare`, each with the number of its part under "part", where there are several.

        Returns:
            x: float32 (nodes, features), of all of them.
            edge_index: int64 (2, edges).
            num_nodes, num_edges, part: int64 (batch,), of each.
        """
        num_nodes = torch.tensor([len(sample["x"]) for sample in samples])
        starts = (num_nodes.cumsum(0) - num_nodes).tolist()
        edges = [sample["edge_index"] + start for sample, start in zip(samples, starts, strict=True)]
        single = len(samples) == 1
        return {
            "x": samples[0]["x"] if single else torch.cat([sample["x"] for sample in samples]),
            "edge_index": samples[0]["edge_index"] if single else torch.cat(edges, dim=1),
            "num_nodes": num_nodes,
            "num_edges": torch.tensor([part.shape[1] for part in edges]),
            "part": torch.tensor([int(sample.get("part", 0)) for sample in samples]),
        }

    def finish_training(
        self, raw: dict[str, torch.Tensor], indices: torch.Tensor, seed: int, epochs: int | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Second half, with everything drawn for the samples `indices`, int64 (batch,), in an epoch of a seeded run.

        Args:
            raw: of `prepare_training`; features that have been filtered before, `propagated_x`, pass as they are.

        Returns:
            x, edge_index: of all graphs.
            bandwidths: float32 (layers, edges), where the method has any.
            neg_edge_index: int64 (2, pairs), pairs without an edge, both in one graph; -1 for none.
            loss_edges: int64 (n,), places of the edges to predict, where a graph has more than `edges_per_step`.
        """
        if "edge_index" not in raw:
            return raw
        inputs = {"x": raw["x"], "edge_index": raw["edge_index"]}
        return inputs if self.temperatures is None else inputs | self._masks(raw, indices, seed, epochs)

    def _masks(self, raw, indices, seed, epochs) -> dict[str, torch.Tensor]:
        device, edge_index = raw["x"].device, raw["edge_index"]
        indices = torch.as_tensor(indices, device=device)
        keys = sample_keys(seed, epochs, indices, purpose=MASK)
        sizes = zip(*(raw[name].tolist() for name in ("num_nodes", "num_edges", "part")), strict=True)
        bandwidths, pairs, chosen, node, edge = [], [], [], 0, 0
        for row, (num_nodes, num_edges, part) in enumerate(sizes):
            draw = keyed_draw(keys[row : row + 1])
            edges = edge_index[:, edge : edge + num_edges] - node
            bandwidths.append(
                torch.stack([bandwidth_mask(draw, edges[1], num_nodes, number) for number in self.temperatures])
            )
            # One order of the edges for all samples of a graph, whose numbers are consecutive.
            order_key = sample_keys(seed, epochs, indices[row : row + 1] - part, purpose=EDGE_ORDER)
            mine = self._part_of_edges(order_key, num_edges, part)
            found = draw_non_edges(draw, edges, num_nodes, max(1, int(self.negative_ratio * len(mine))))
            pairs.append(torch.where(found < 0, found, found + node))
            chosen.append(mine + edge)
            node, edge = node + num_nodes, edge + num_edges
        masks = {"bandwidths": torch.cat(bandwidths, dim=1), "neg_edge_index": torch.cat(pairs, dim=1)}
        loss_edges = torch.cat(chosen)
        return masks if len(loss_edges) == edge_index.shape[1] else masks | {"loss_edges": loss_edges}

    def _part_of_edges(self, key: torch.Tensor, num_edges: int, part: int) -> torch.Tensor:
        """int64: places of the edges of one part, in a random order."""
        if num_edges <= self.edges_per_step:
            return torch.arange(num_edges, device=key.device)
        order = keyed_draw(key)(num_edges)[0].argsort()
        return order[part * self.edges_per_step : (part + 1) * self.edges_per_step]

    def __call__(
        self, graphs, training: bool = False, seed: int | None = None, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Both halves.

        Args:
            graphs: one, or a list of them, see `prepare`. `y`, int64 (nodes,), where a graph has it, becomes `labels`;
                nodes outside of `train_mask`, where it has that, get -100 in training.
            training: draw what the method masks.
            seed: of the draws; by default torch's generator picks it.
            return_tensors: "pt", or "np".
        """
        graphs = list(graphs) if isinstance(graphs, list | tuple) else [graphs]
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        indices = torch.arange(len(graphs))
        raw = self.prepare_training([self.prepare(graph) for graph in graphs], indices, seed, 0)
        if training:
            inputs = self.finish_training(raw, indices, seed, 0)
        else:
            inputs = {name: raw[name] for name in ("x", "edge_index")}
        labels = [labels_of(graph, training) for graph in graphs]
        if all(part is not None for part in labels):
            inputs["labels"] = torch.cat(labels)
        return BatchFeature(inputs, tensor_type=return_tensors)

    def save_plain(self, folder) -> None:
        """Nothing: transformers has no processor of graphs."""


def labels_of(graph, training: bool = False) -> torch.Tensor | None:
    """int64 (nodes,): the classes of a graph's nodes, -100 where there is none or, in training, where it is not for
    training; None without any."""
    classes, mask = _field(graph, "y", None), _field(graph, "train_mask", None)
    if classes is None:
        return None
    classes = torch.as_tensor(classes).long().flatten()
    classes = torch.where(classes < 0, -100, classes)
    return classes if mask is None or not training else torch.where(torch.as_tensor(mask), classes, -100)


_NEEDED = object()


def _field(graph, name: str, default=_NEEDED):
    value = graph.get(name) if isinstance(graph, dict) else getattr(graph, name, None)
    if value is None and default is _NEEDED:
        raise ValueError(f"The graph has no `{name}`; give a dict, a Graph or torch-geometric's Data with it.")
    return value


__all__ = ["GraphProcessor", "labels_of"]
