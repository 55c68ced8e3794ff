"""Geometry of point clouds in plain torch: farthest-point sampling, nearest neighbours, groups, Chamfer distance.

Distances come from differences of coordinates: a^2 + b^2 - 2ab loses the digits of points that lie close together, and
can turn negative.
"""

import torch

# Point clouds' coordinates.
AXES = 3


@torch.library.custom_op("hf_masked::farthest_point_sample", mutates_args=())
def farthest_point_sample(points: torch.Tensor, num_samples: int, exclude_radius: float = 0.0) -> torch.Tensor:
    """Indices of points that lie far from each other: first point 0, then always the farthest from those chosen.

    An operator of its own, so that `torch.compile` sees one node and not a loop.

    Args:
        points: float32 (batch, points, 3), finite.
        num_samples: how many to choose, at most as many as there are.
        exclude_radius: points this near to the origin, or nearer, are not chosen, point 0 apart. 0 leaves none out but
            the origin itself. The CUDA kernel that most codes of the field use has sqrt(1e-3) (its `mag <= 1e-3`).

    Returns:
        int64 (batch, num_samples). Among equally far points the first is chosen.
    """
    batch, count, _ = points.shape
    rows = torch.arange(batch, device=points.device)
    allowed = points.square().sum(dim=-1) > exclude_radius**2
    nearest = torch.full((batch, count), torch.inf, dtype=points.dtype, device=points.device)
    chosen = torch.zeros(batch, num_samples, dtype=torch.int64, device=points.device)
    for pick in range(1, num_samples):
        last = points[rows, chosen[:, pick - 1]].unsqueeze(1)  # (batch, 1, 3)
        nearest = torch.minimum(nearest, (points - last).square().sum(dim=-1))
        chosen[:, pick] = torch.where(allowed, nearest, -1.0).argmax(dim=1)
    return chosen


@farthest_point_sample.register_fake
def _(points: torch.Tensor, num_samples: int, exclude_radius: float = 0.0) -> torch.Tensor:
    return points.new_empty((points.shape[0], num_samples), dtype=torch.int64)


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(..., n, 3) and (..., m, 3) -> (..., n, m), one axis after the other, so that no (..., n, m, 3) is held."""
    return sum((a[..., axis].unsqueeze(-1) - b[..., axis].unsqueeze(-2)).square() for axis in range(AXES))


def nearest_neighbours(points: torch.Tensor, centers: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the points nearest to each centre, the nearest first.

    Args:
        points: float (batch, points, 3).
        centers: float (batch, centers, 3).
        count: at most as many as there are points.

    Returns:
        int64 (batch, centers, count).
    """
    return squared_distances(centers, points).topk(count, dim=-1, largest=False, sorted=True).indices


def gather_points(points: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Points (batch, points, 3) at `indices`, int64 (batch, ...): (batch, ..., 3)."""
    chosen = points.gather(1, indices.flatten(1).unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    return chosen.view(*indices.shape, points.shape[-1])


@torch.no_grad()
def group_points(
    points: torch.Tensor, num_groups: int, group_size: int, exclude_radius: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping patches of a cloud: centres far from each other, and the points nearest to each.

    In float32, whatever the autocast: half precision would move the points.

    Args:
        points: float (batch, points, 3).
        num_groups, group_size: of patches, and of points in each.
        exclude_radius: see `farthest_point_sample`.

    Returns:
        center: float32 (batch, groups, 3).
        neighborhood: float32 (batch, groups, group_size, 3), relative to the centre, which is among them.
    """
    with torch.autocast(points.device.type, enabled=False):
        points = points.float()
        center = gather_points(points, farthest_point_sample(points, num_groups, exclude_radius))
        neighborhood = gather_points(points, nearest_neighbours(points, center, group_size))
        return center, neighborhood - center.unsqueeze(2)


def chamfer_distance(a: torch.Tensor, b: torch.Tensor, squared: bool = True) -> torch.Tensor:
    """How far two sets of points are from each other, whatever their order (Fan et al., arXiv 1612.00603).

    Args:
        a: float32 (..., n, 3).
        b: float32 (..., m, 3).
        squared: the mean over a of the squared distance to the nearest of b, plus the mean over b likewise. Otherwise
            half the sum of the means of the distances themselves, whose gradient at 0 is cut off at 1e-12.

    Returns:
        float32 (...), one number per pair of sets. The gradient goes through the nearest pairs alone.
    """
    distances = squared_distances(a, b)
    # `min` with an index: `amin` would split the gradient among equals.
    nearest = distances.min(dim=-1).values, distances.min(dim=-2).values
    if squared:
        return nearest[0].mean(dim=-1) + nearest[1].mean(dim=-1)
    roots = [values.clamp(min=1e-12).sqrt().mean(dim=-1) for values in nearest]
    return (roots[0] + roots[1]) / 2
