"""Bandwidths: masks on edges that are no 0 and 1 (Bandana, arXiv 2402.03814, section 4.1).

No edge is taken away. Each gets a random share of what its receiver may take in; the shares of a receiver sum to 1.
"""

import math

import torch

from hf_masked.randomness import Draw

# Uniform numbers are multiples of 2**-24 from 0 on. Doubled and moved by this they lie strictly between -1 and 1, in
# float32 too, so that the normal ones are finite.
_STEP = 2.0**-24


def bandwidth_mask(draw: Draw, receivers: torch.Tensor, num_nodes: int, temperature: float) -> torch.Tensor:
    """Random bandwidths: normal numbers, one for each directed edge, through `bandwidths_of`.

    Args:
        draw: of one row; takes as many numbers as there are edges.
        receivers, num_nodes, temperature: see `bandwidths_of`.

    Returns:
        float32 (edges,).
    """
    uniform = 2 * draw(len(receivers))[0] - 1 + _STEP
    return bandwidths_of(math.sqrt(2) * torch.erfinv(uniform), receivers, num_nodes, temperature)


def bandwidths_of(scores: torch.Tensor, receivers: torch.Tensor, num_nodes: int, temperature: float) -> torch.Tensor:
    """The softmax of `scores / temperature` over the edges of each receiver (equation 2).

    Args:
        scores: float (edges,).
        receivers: int64 (edges,), the node that an edge leads to.
        num_nodes: of the graph.
        temperature: above 0; towards 0 one edge of each receiver takes all, towards infinity all take the same.

    Returns:
        float32 (edges,), in [0, 1], 1 in sum for each receiver.
    """
    # torch-geometric's softmax would have to be imported here, which a compiled step cannot.
    scores = scores.float() / temperature
    largest = scores.new_full((num_nodes,), -torch.inf).scatter_reduce(0, receivers, scores, "amax")
    shares = (scores - largest[receivers]).exp()
    return shares / shares.new_zeros(num_nodes).index_add(0, receivers, shares)[receivers]
