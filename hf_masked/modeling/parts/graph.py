"""Graphs as (2, edges) tensors: checks, the normalised adjacency with self-loops, and propagation over it."""

import torch

SELF_LOOPS = ("add", "keep", "none")

# Largest number of values that are on their way along edges at once.
_MESSAGES = 2**26


def check_graph(x: torch.Tensor, edge_index: torch.Tensor, num_features: int) -> None:
    """Raises a ValueError unless these are features of nodes with the right width, and edges between nodes."""
    if x.ndim != 2 or x.shape[1] != num_features:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}; the model takes (nodes, {num_features}): make it with "
            f"num_features={x.shape[-1]}, or give other features."
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"`edge_index` has shape {tuple(edge_index.shape)} and dtype {edge_index.dtype}; expected int64 "
            "(2, edges), senders and receivers."
        )


def normalized_edges(
    edge_index: torch.Tensor, num_nodes: int, edge_weight: torch.Tensor | None = None, self_loops: str = "add"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges and weights of D^-1/2 (A + I) D^-1/2, where D are the weighted degrees of A + I (Kipf and Welling,
    arXiv 1609.02907, equation 2).

    An edge from j to i weighs a_ij / sqrt(d_i d_j), d_i being what leads to i, its self-loop included. The shapes
    depend on the graph's size alone.

    Args:
        edge_index: int64 (2, edges), senders and receivers.
        num_nodes: of the graph.
        edge_weight: float (edges,); by default 1.
        self_loops: "add" one of weight 1 to every node, also to those that have one already, whose weights add up;
            "keep" those of the graph as they are, and add one to the other nodes; "none" adds none.

    Returns:
        int64 (2, edges + nodes), the self-loops last, and float32 (edges + nodes,); an added loop may weigh 0.
    """
    senders, receivers = edge_index
    weight = torch.ones(len(receivers), device=receivers.device) if edge_weight is None else edge_weight.float()
    added = torch.full((num_nodes,), float(self_loops != "none"), device=weight.device)
    if self_loops == "keep":
        added = added.scatter_reduce(0, receivers, (senders != receivers).float(), "amin")
    degree = added.index_add(0, receivers, weight)
    scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
    nodes = torch.arange(num_nodes, device=edge_index.device)
    edges = torch.cat([edge_index, nodes.expand(2, -1)], dim=1)
    return edges, scale[edges[0]] * torch.cat([weight, added]) * scale[edges[1]]


def propagate(x: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor, num_hops: int = 1) -> torch.Tensor:
    """Each node takes in the weighted sum of what its senders have, so many times.

    Args:
        x: float (nodes, features).
        edge_index: int64 (2, edges), senders and receivers.
        edge_weight: float32 (edges,).
        num_hops: 0 changes nothing.

    Returns:
        As `x`; sums are taken in float32.
    """
    senders, receivers = edge_index
    states = x.float()
    for _ in range(num_hops):
        columns = states.split(max(1, _MESSAGES // max(1, len(senders))), dim=1)
        states = torch.cat(
            [
                torch.zeros_like(part).index_add(0, receivers, edge_weight.unsqueeze(1) * part[senders])
                for part in columns
            ],
            dim=1,
        )
    return states.to(x.dtype)


def random_ring(num_nodes: int) -> torch.Tensor:
    """The edges of a ring of the nodes in a random order, both directions: int64 (2, 2 * num_nodes), for examples."""
    order = torch.randperm(num_nodes)
    ring = torch.stack([order, order.roll(1)])
    return torch.cat([ring, ring.flip(0)], dim=1)
