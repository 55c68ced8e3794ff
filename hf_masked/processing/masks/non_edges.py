"""Pairs of nodes without an edge between them, to tell edges from.

torch-geometric's `negative_sampling` draws from Python's and numpy's global generators and returns as many pairs as it
finds. A training step needs draws that follow from its key, and shapes that stay the same.
"""

import torch

from hf_masked.randomness import Draw

# Of a pair's candidates the first that is no edge is taken.
CANDIDATES = 4


def draw_non_edges(draw: Draw, edge_index: torch.Tensor, num_nodes: int, count: int) -> torch.Tensor:
    """Draws ordered pairs of two different nodes uniformly, with replacement, from those that are no edges.

    Args:
        draw: of one row; takes 2 * CANDIDATES * count numbers.
        edge_index: int64 (2, edges), senders and receivers.
        num_nodes: at most 2**24.
        count: of pairs.

    Returns:
        int64 (2, count), on the device of the draw; (-1, -1) where all candidates were edges, which is rare unless
        almost all pairs are.
    """
    numbers = draw(2 * CANDIDATES * count)[0].view(2, CANDIDATES, count)
    pairs = (numbers * num_nodes).long().clamp(max=num_nodes - 1)
    edges = (edge_index[0] * num_nodes + edge_index[1]).sort().values
    wanted = pairs[0] * num_nodes + pairs[1]  # (candidates, count)
    place = torch.searchsorted(edges, wanted).clamp(max=len(edges) - 1)
    good = (edges[place] != wanted) & (pairs[0] != pairs[1])
    first = good.int().argmax(dim=0, keepdim=True)
    chosen = pairs.gather(1, first.expand(2, 1, count))[:, 0]
    return torch.where(good.any(dim=0), chosen, -1)
