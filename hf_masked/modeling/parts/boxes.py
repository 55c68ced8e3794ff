"""Boxes: overlap, suppression, and the code of YOLOv2's anchors (arXiv 1612.08242).

Boxes are float (..., 4), (left, top, right, bottom). Anchors are float (..., 4), (column, row, width, height) in cells
of the grid: column and row are a cell's upper left corner.
"""

import torch


def box_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes that broadcast, (...); 0 where both are empty."""
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = _area(first) + _area(second) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def non_maximum_suppression(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which boxes stay when each takes away those of lower score that it overlaps by `threshold` or more.

    Args:
        boxes: (n, 4).
        scores: (n,).
        threshold: intersection over union.

    Returns:
        int64 (kept,), by falling score.
    """
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order):
        best, others = order[0], order[1:]
        kept.append(best)
        order = others[box_iou(boxes[best], boxes[others]) < threshold]
    return torch.stack(kept) if kept else order


def grid_anchors(anchors: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """All anchors of a grid.

    Args:
        anchors: float (anchors, 2), widths and heights in cells.
        rows, columns: of the grid.

    Returns:
        float (rows * columns * anchors, 4), cell by cell in raster order.
    """
    row, column = torch.meshgrid(
        torch.arange(rows, device=anchors.device), torch.arange(columns, device=anchors.device), indexing="ij"
    )
    cells = torch.stack([column, row], dim=-1).view(-1, 1, 2).expand(-1, len(anchors), 2).to(anchors.dtype)
    return torch.cat([cells, anchors.expand(len(cells), -1, 2)], dim=-1).flatten(0, 1)


def decode_boxes(deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes in cells, of their code: the centre's offset from the cell's corner, and width and height as shares of the
    anchor's (not their logarithms). Both are (..., 4)."""
    centre, size = anchors[..., :2] + deltas[..., :2], anchors[..., 2:] * deltas[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def encode_boxes(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """The code of boxes in cells, see `decode_boxes`."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    return torch.cat([centre - anchors[..., :2], size / anchors[..., 2:]], dim=-1)


def space_to_depth(hidden: torch.Tensor, stride: int = 2) -> torch.Tensor:
    """(batch, channels, rows, columns) to (batch, stride**2 * channels, rows / stride, columns / stride), a
    permutation. Channels lie together by place in the cell, which is the order of YOLOv2's "reorg" layer in torch;
    `pixel_unshuffle` has the places together by channel."""
    channels = hidden.shape[1]
    cells = torch.nn.functional.pixel_unshuffle(hidden, stride)
    return cells.unflatten(1, (channels, stride**2)).transpose(1, 2).flatten(1, 2)
