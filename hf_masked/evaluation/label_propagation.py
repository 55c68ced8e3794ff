"""Label propagation: do patches with like features belong to the same thing in the next frames? And J and F, which say
how well masks fit (Jabri et al., arXiv 2006.14613; Perazzi et al., CVPR 2016; Pont-Tuset et al., arXiv 1704.00675)."""

import math
from collections.abc import Iterable

import torch
from torch.nn import functional as F

from hf_masked.data.annotated_clips import AnnotatedClip
from hf_masked.evaluation.features import ImageSettings, evaluation_mode, to_model_input
from hf_masked.modeling.parts.patches import pair
from hf_masked.modeling.parts.pooling import interpolation_argument, patch_tokens


def evaluate_clips(encoder, settings: ImageSettings, clips: Iterable[AnnotatedClip], **options) -> dict[str, float]:
    """J and F of the masks that a frozen encoder carries from the first frame of each clip through the others.

    As DAVIS has it, objects count alike, and the first and the last frame are left out.

    Args:
        encoder: a stock encoder of tokens, or one of this package.
        settings: its normalisation; frames keep their size, cut to multiples of the patch.
        clips: three frames or more each.
        options: of `propagate_labels`.

    Returns:
        "j", "f", "j_and_f", means over all objects; "objects", how many.

    Raises:
        ValueError: for clips that are too short, or without an object.
    """
    totals, objects = {"j": 0.0, "f": 0.0, "j_and_f": 0.0}, 0
    for clip in clips:
        if len(clip.frames) < 3:
            raise ValueError(f"{clip.name} has {len(clip.frames)} frames; the first and the last are not judged.")
        predicted = propagated_masks(encoder, settings, clip, **options)
        found = segmentation_measures(predicted[1:-1], clip.masks[1:-1])
        count = len(set(clip.masks[1:-1].unique().tolist()) - {0})
        totals = {name: value + count * found[name] for name, value in totals.items()}
        objects += count
    if objects == 0:
        raise ValueError("There are no clips to judge.")
    return {name: value / objects for name, value in totals.items()} | {"objects": objects}


def propagated_masks(encoder, settings: ImageSettings, clip: AnnotatedClip, **options) -> torch.Tensor:
    """int64 (frames, height, width): the first frame's mask, carried through the clip; see `evaluate_clips`."""
    patch = pair(encoder.config.patch_size)
    height, width = (side // step * step for side, step in zip(clip.frames.shape[-2:], patch, strict=True))
    features = patch_features(encoder, settings, clip.frames[..., :height, :width])
    first = soft_labels(clip.masks[0, :height, :width], int(clip.masks.max()) + 1, tuple(features.shape[1:3]))
    masks = hard_labels(propagate_labels(features, first, **options), (height, width)).cpu()
    # What was cut off is background, as far as anyone has said.
    return F.pad(masks, (0, clip.frames.shape[-1] - width, 0, clip.frames.shape[-2] - height))


@torch.no_grad()
def patch_features(encoder, settings: ImageSettings, frames: torch.Tensor) -> torch.Tensor:
    """float32 (frames, rows, columns, width) of uint8 (frames, channels, height, width), one frame at a time."""
    size = tuple(frames.shape[-2:])
    parameter = next(encoder.parameters())
    found = []
    with evaluation_mode(encoder):
        for frame in frames.split(1):
            values = to_model_input(
                frame.to(parameter.device), settings.mean, settings.std, None, settings.num_channels
            )
            outputs = encoder(values.to(parameter.dtype), **interpolation_argument(encoder, size))
            found.append(patch_tokens(outputs.last_hidden_state, encoder.config, size).float())
    return torch.cat(found)


@torch.inference_mode()
def propagate_labels(
    features: torch.Tensor,
    labels: torch.Tensor,
    context: int = 20,
    radius: float = 20.0,
    top_k: int = 7,
    temperature: float = 0.7,
) -> torch.Tensor:
    """Carries the labels of a clip's first frame through the frames after it.

    The label of a patch is the mean, weighted by the softmax of the cosines, of the labels of the `top_k` patches most
    like it, in the first frame and in the `context` frames before its own. As in alexandre-eymael/CropMAE
    (`downstreams/propagation/src/test.py`), whose settings are the defaults, copies of the first frame stand in for
    the frames that the beginning of the clip lacks; they count among the `top_k` each by itself.

    Args:
        features: float (frames, rows, columns, width) of the patches, on any device, where the work is done.
        labels: float (rows, columns, labels) of the first frame, see `soft_labels`.
        context: previous frames that are looked at.
        radius: patches of those frames that are so far away, or farther, in patches, do not count; of the first frame
            all do.
        top_k: patches that are averaged.
        temperature: of the softmax.

    Returns:
        float32 (frames, rows, columns, labels), the first frame's as they were given.

    Raises:
        ValueError: for labels of another grid, or settings that are not above 0.
    """
    frames, rows, columns, _ = features.shape
    if tuple(labels.shape[:2]) != (rows, columns) or labels.ndim != 3:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected ({rows}, {columns}, labels), the features' grid: make "
            "them with `soft_labels`."
        )
    for name, value in (("context", context), ("radius", radius), ("top_k", top_k), ("temperature", temperature)):
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0.")
    features = F.normalize(features.float(), dim=-1).flatten(1, 2)  # (frames, patches, width)
    propagated = labels.float().to(features.device).flatten(0, 1).expand(frames, -1, -1).clone()
    beyond = _distances(rows, columns, features.device) >= radius  # (patches, patches)
    for frame in range(1, frames):
        previous = torch.arange(frame - context, frame, device=features.device).clamp(min=0)
        cosines = features[frame] @ features[previous].transpose(1, 2)  # (context, patches, source patches)
        near = cosines.masked_fill(beyond, -torch.inf)
        first = features[frame] @ features[0].T  # (patches, source patches)
        candidates = torch.cat([first[None], near]).permute(1, 0, 2).flatten(1)
        values, sources = (candidates / temperature).topk(min(top_k, candidates.shape[1]), dim=1)
        of_sources = torch.cat([propagated[:1], propagated[previous]]).flatten(0, 1)[sources]
        propagated[frame] = (values.softmax(dim=1).unsqueeze(-1) * of_sources).sum(dim=1)
    return propagated.unflatten(1, (rows, columns))


def soft_labels(mask: torch.Tensor, num_labels: int, grid: tuple[int, int]) -> torch.Tensor:
    """Labels of a grid of patches: those of the pixels, one-hot and resized bilinearly.

    Args:
        mask: int64 (height, width), from 0 to `num_labels` - 1.
        num_labels: the background counts.
        grid: (rows, columns).

    Returns:
        float32 (rows, columns, num_labels).
    """
    one_hot = F.one_hot(mask, num_labels).permute(2, 0, 1)[None].float()
    return F.interpolate(one_hot, grid, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def hard_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks of soft labels, which are resized bilinearly.

    Args:
        labels: float (frames, rows, columns, labels), of `propagate_labels`.
        size: (height, width) in pixels.

    Returns:
        int64 (frames, height, width), the likeliest label of each pixel.
    """
    return F.interpolate(labels.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False).argmax(dim=1)


def segmentation_measures(predictions: torch.Tensor, references: torch.Tensor) -> dict[str, float]:
    """J and F of masks: means over the objects and the frames.

    DAVIS leaves out a clip's first frame, which is given, and its last one: so should the caller.

    Args:
        predictions, references: int64 (frames, height, width); 0 is the background, and each other label of the
            references an object.

    Returns:
        "j" (region similarity), "f" (contour accuracy) and "j_and_f", their mean, in [0, 1].

    Raises:
        ValueError: for unequal shapes, or references without an object.
    """
    if predictions.shape != references.shape or references.ndim != 3:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)} and references {tuple(references.shape)}; expected "
            "(frames, height, width) twice."
        )
    objects = [label for label in references.unique().tolist() if label != 0]
    if not objects:
        raise ValueError("The references hold the background alone: there is no object to measure.")
    pairs = [(predictions == label, references == label) for label in objects]
    j = torch.cat([region_similarity(*pair) for pair in pairs]).mean().item()
    f = torch.cat([contour_accuracy(*pair) for pair in pairs]).mean().item()
    return {"j": j, "f": f, "j_and_f": (j + f) / 2}


def region_similarity(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """J: intersection over union of bool masks (frames, height, width), float32 (frames,); 1 where both are empty."""
    union = (prediction | reference).sum(dim=(1, 2))
    return torch.where(union > 0, (prediction & reference).sum(dim=(1, 2)) / union.clamp(min=1), 1.0)


def contour_accuracy(prediction: torch.Tensor, reference: torch.Tensor, tolerance: float = 0.008) -> torch.Tensor:
    """F: harmonic mean of the contours' precision and recall of bool masks (frames, height, width): float32 (frames,).

    A pixel of a contour is right where the other contour passes within the tolerance. 1 where neither mask has one.

    Args:
        tolerance: as a share of the picture's diagonal, rounded up to pixels.
    """
    distance = math.ceil(tolerance * math.hypot(*reference.shape[-2:]))
    ours, theirs = contours(prediction), contours(reference)
    precision, recall = _share(ours, _widened(theirs, distance)), _share(theirs, _widened(ours, distance))
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def contours(mask: torch.Tensor) -> torch.Tensor:
    """Pixels that differ from the next one to the right, below or both, of bool (frames, height, width)."""
    beyond = F.pad(mask[:, None].float(), (0, 1, 0, 1), mode="replicate")[:, 0].bool()
    here, right, below, both = beyond[:, :-1, :-1], beyond[:, :-1, 1:], beyond[:, 1:, :-1], beyond[:, 1:, 1:]
    return (here ^ right) | (here ^ below) | (here ^ both)


def _share(contour: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Share of each contour's pixels that lie in `near`, float32 (frames,); 1 of a contour without pixels."""
    total = contour.sum(dim=(1, 2))
    return torch.where(total > 0, (contour & near).sum(dim=(1, 2)) / total.clamp(min=1), 1.0)


def _widened(contour: torch.Tensor, distance: int) -> torch.Tensor:
    """Pixels within a distance of the contour."""
    steps = torch.arange(-distance, distance + 1, device=contour.device)
    disk = (steps[:, None].square() + steps.square() <= distance**2).float()
    return F.conv2d(contour[:, None].float(), disk[None, None], padding=distance)[:, 0] > 0.5


def _distances(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Euclidean, between the patches of a grid: float32 (patches, patches)."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float().to(device)
    return torch.cdist(places, places)
