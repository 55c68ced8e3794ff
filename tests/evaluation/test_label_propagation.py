"""Label propagation, and J and F: cases made by hand, and the reference's numbers."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from hf_masked.data.annotated_clips import annotated_clips
from hf_masked.evaluation import metrics
from hf_masked.evaluation.features import ImageSettings
from hf_masked.evaluation.label_propagation import (
    contour_accuracy,
    contours,
    evaluate_clips,
    hard_labels,
    propagate_labels,
    propagated_masks,
    region_similarity,
    segmentation_measures,
    soft_labels,
)
from tests.parity.fill import filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[1] / "parity" / "cropmae.json").read_text())


@pytest.mark.parametrize("name", PARITY["propagation"])
def test_propagated_labels_are_the_references(name):
    run = PARITY["propagation"][name]
    _, rows, columns, _ = run["shape"]
    labels = filled_noise(rows * columns, run["classes"], f"{name}.labels").view(rows, columns, -1)
    labels = labels / labels.sum(dim=-1, keepdim=True)
    settings = {name: run[name] for name in ("context", "radius", "top_k", "temperature")}
    found = propagate_labels(filled_pixels(run["shape"], f"{name}.features"), labels, **settings)
    torch.testing.assert_close(found, torch.tensor(run["labels"]), rtol=1e-5, atol=1e-6)


def masks_of_the_run(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = np.mgrid[0:48, 0:64]
    disk = (y - 20) ** 2 + (x - 30) ** 2 < 15**2
    empty = disk & False
    references, predictions = {
        "shifted": (disk, (y - 22) ** 2 + (x - 33) ** 2 < 14**2),
        "same": (disk, disk),
        "none": (disk, empty),
        "edge": (disk, x > 30),
        "speckled": (disk, disk ^ ((7 * x + 13 * y) % 29 == 0)),
        "nothing": (empty, empty),
        "too much": (empty, disk),
    }[kind]
    return torch.from_numpy(predictions)[None], torch.from_numpy(references)[None]


@pytest.mark.parametrize("run", PARITY["measures"])
def test_measures_are_the_references(run):
    kind, tolerance = run.rsplit(" ", 1)
    prediction, reference = masks_of_the_run(kind)
    j, f = PARITY["measures"][run]
    assert region_similarity(prediction, reference).item() == pytest.approx(j, rel=1e-6)
    assert contour_accuracy(prediction, reference, float(tolerance)).item() == pytest.approx(f, rel=1e-6)


def moving(frames: int, step: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip 6 x 8 patches large whose every patch has a feature of its own that moves to the right, and comes back on
    the left; and where the patches of the first frame's upper left 3 x 3 have gone: bool (frames, 6, 8)."""
    first = torch.randn(6, 8, 32, generator=torch.Generator().manual_seed(0))
    object_ = torch.zeros(6, 8, dtype=torch.bool)
    object_[:3, :3] = True
    shifts = [step * frame for frame in range(frames)]
    return tuple(torch.stack([whole.roll(shift, dims=1) for shift in shifts]) for whole in (first, object_))


def test_labels_follow_features_that_move():
    features, moved = moving(4)
    labels = F.one_hot(moved[0].long(), 2).float()
    found = propagate_labels(features, labels, context=2, radius=3, top_k=1)
    assert torch.equal(found.argmax(dim=-1).bool(), moved) and torch.equal(found[0], labels)


def test_what_is_farther_than_the_radius_is_not_found_but_in_the_first_frame():
    features, moved = moving(3, step=2)
    labels = F.one_hot(moved[0].long(), 2).float()
    # The first frame is searched whole: what moved far is found there.
    found = propagate_labels(features, labels, context=1, radius=1, top_k=1).argmax(dim=-1).bool()
    assert torch.equal(found, moved)
    # A frame that has nothing in common with the first one: labels come from the frame before, from near patches.
    features = torch.randn(3, 6, 8, 16, generator=torch.Generator().manual_seed(1))
    features[0] = -features[1]
    features[2] = features[1].roll(3, dims=1)
    near, far = (propagate_labels(features, labels, context=1, radius=r, top_k=1)[2] for r in (3, 4))
    second = propagate_labels(features, labels, context=1, radius=4, top_k=1)[1]
    assert torch.equal(far[:, 3:], second.roll(3, dims=1)[:, 3:]) and not torch.equal(near[:, 3:], far[:, 3:])


def test_neighbours_are_weighted_by_the_softmax_of_their_cosines():
    features = torch.tensor([[[[1.0, 0.0], [0.6, 0.8]]], [[[2.0, 0.0], [0.0, 3.0]]]])  # two frames of 1 x 2 patches
    labels = torch.eye(2)[None]
    # Patches of the first frame count twice each, as the first frame and as the one frame before.
    found = propagate_labels(features, labels, context=1, top_k=4, temperature=0.5)[1, 0]
    for patch, cosines in enumerate(([1.0, 0.6], [0.0, 0.8])):
        torch.testing.assert_close(found[patch], torch.tensor(cosines).div(0.5).softmax(dim=0))
    nearest = propagate_labels(features, labels, context=1, top_k=2)[1, 0]
    torch.testing.assert_close(nearest, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_soft_and_hard_labels_are_each_others_inverse_on_patches():
    patches = torch.randint(3, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = patches.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)
    soft = soft_labels(mask, 3, (5, 7))
    assert soft.shape == (5, 7, 3) and torch.equal(soft.argmax(dim=-1), patches)
    torch.testing.assert_close(soft.sum(dim=-1), torch.ones(5, 7))
    assert torch.equal(hard_labels(soft[None], (5, 7))[0], patches)


def test_contours_lie_where_masks_change():
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[0, 1:4, 2:5] = True
    expected = torch.tensor(
        [[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]
    ).bool()
    assert torch.equal(contours(mask)[0], expected)
    assert not contours(torch.ones(1, 4, 4, dtype=torch.bool)).any(), "the picture's border is no contour"


def test_measures_are_means_over_objects_and_frames():
    references = torch.zeros(2, 20, 30, dtype=torch.int64)
    references[:, 2:10, 2:10], references[:, 12:18, 15:25] = 1, 3
    predictions = references.clone()
    predictions[1][references[1] == 3] = 0  # one of four: missed
    found = segmentation_measures(predictions, references)
    assert found == {"j": 0.75, "f": 0.75, "j_and_f": 0.75}
    predictions[1][references[1] == 1] = 2  # another label is no hit
    assert segmentation_measures(predictions, references)["j"] == 0.5
    metric = evaluate.load(str(Path(metrics.__file__).parent / "label_propagation.py"))
    assert metric.compute(predictions=predictions.tolist(), references=references.tolist())["j_and_f"] == 0.5


def test_wrong_arguments_are_named():
    features = torch.randn(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"expected \(3, 4, labels\)"):
        propagate_labels(features, torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match="top_k is 0"):
        propagate_labels(features, torch.zeros(3, 4, 2), top_k=0)
    with pytest.raises(ValueError, match="no object"):
        segmentation_measures(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4).long())
    with pytest.raises(ValueError, match="twice"):
        segmentation_measures(torch.zeros(4, 4).long(), torch.zeros(4, 4).long())


def moving_squares(folder: Path, frames: int = 5, resolution: str = "") -> Path:
    """A clip like DAVIS's: a light square wanders over a dark ground, and a gray one stands still."""
    for kind in ("JPEGImages", "Annotations"):
        (folder / kind / resolution / "squares").mkdir(parents=True)
    for frame in range(frames):
        picture, mask = np.full((34, 48), 10, np.uint8), np.zeros((34, 48), np.uint8)
        for value, label, left in ((240, 200, 4 + 4 * frame), (120, 255, 36)):
            picture[8:20, left : left + 8], mask[8:20, left : left + 8] = value, label
        Image.fromarray(picture).save(folder / "JPEGImages" / resolution / "squares" / f"{frame:05}.png")
        Image.fromarray(mask).save(folder / "Annotations" / resolution / "squares" / f"{frame:05}.png")
    return folder


@pytest.fixture
def encoder():
    """Features that are the patches' colours: a ViT without layers whose embedding is a constant kernel."""
    config = ViTConfig(
        image_size=32, patch_size=4, num_channels=1, hidden_size=4, num_hidden_layers=0, num_attention_heads=1
    )
    model = ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embeddings.patch_embeddings.projection.weight[0] = 1 / 16
        model.embeddings.patch_embeddings.projection.bias[1] = 0.5
    model.layernorm = torch.nn.Identity()
    return model


@pytest.mark.parametrize("resolution", ["", "480p"])
def test_masks_follow_what_looks_alike(tmp_path, encoder, resolution):
    settings = ImageSettings((0.0,), (1.0,), (32, 32))
    (clip,) = annotated_clips(moving_squares(tmp_path, resolution=resolution), num_channels=1)
    assert clip.frames.shape == (5, 1, 34, 48) and clip.masks.unique().tolist() == [0, 1, 2]
    masks = propagated_masks(encoder, settings, clip, temperature=0.05, top_k=3)
    assert masks.shape == clip.masks.shape
    centres = [(masks[frame] == 1).nonzero()[:, 1].float().mean() for frame in range(5)]
    assert torch.stack(centres).diff().sub(4).abs().max() < 1, "the light square moves by four pixels a frame"
    found = evaluate_clips(encoder, settings, [clip], temperature=0.05, top_k=3)
    assert found["objects"] == 2 and found["j"] > 0.7
    expected = segmentation_measures(masks[1:-1], clip.masks[1:-1])
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_clips_that_cannot_be_judged_are_named(tmp_path, encoder):
    settings = ImageSettings((0.0,), (1.0,), (32, 32))
    with pytest.raises(ValueError, match="JPEGImages"):
        list(annotated_clips(tmp_path))
    folder = moving_squares(tmp_path, frames=2)
    with pytest.raises(ValueError, match="squares has 2 frames"):
        evaluate_clips(encoder, settings, annotated_clips(folder, 1))
    Image.new("L", (9, 9)).save(folder / "Annotations" / "squares" / "00001.png")
    with pytest.raises(ValueError, match=r"00001.png is \(34, 48\) pixels large and its mask \(9, 9\)"):
        list(annotated_clips(folder, 1))
    with pytest.raises(ValueError, match="no clips"):
        evaluate_clips(encoder, settings, [])
