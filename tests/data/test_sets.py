"""Samples of several pictures: which belong together, and how data sets hand them out."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked import CropPairImageProcessor
from hf_masked.data import ImageDataset, ResidentImageDataset, load_images
from hf_masked.data.cached import write_cache
from hf_masked.data.sets import SAMPLES, ClassPairs, FramePairs, Rows, Triplets, make_sets
from hf_masked.data.sources import ArraySource, FolderSource, TableSource
from hf_masked.modeling.registry import CATALOGUE
from hf_masked.processing.multi_view import MultiViewImageProcessor
from hf_masked.training.modalities.image import MODALITY

LABELS = np.array([0] * 50 + [1] * 10 + [2] * 3 + [3] + [-1] * 4)


def labelled(labels: np.ndarray = LABELS) -> ArraySource:
    """Pictures whose every pixel tells their number."""
    images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None], (len(labels), 8, 8))
    return ArraySource("numbers", images, labels)


def processor(pictures: int) -> MultiViewImageProcessor:
    return MultiViewImageProcessor(8, num_views=pictures, num_channels=1, photometric=None)


def test_triplets_hold_two_of_a_class_and_one_of_another():
    triplets, labels = Triplets(labelled()), torch.from_numpy(LABELS)
    drawn = triplets.pictures(torch.arange(len(triplets)).repeat(40), 0, torch.arange(40).repeat_interleave(64))
    anchor, positive, negative = drawn.unbind(dim=1)
    assert len(triplets) == 64
    assert (anchor != positive).all() and (labels[anchor] == labels[positive]).all()
    assert (labels[anchor] != labels[negative]).all() and (labels[drawn] >= 0).all()
    shares = labels[anchor].bincount(minlength=4) / len(anchor)
    # Class by class, not picture by picture; the class of one picture has no pair, but is a negative.
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]), atol=0.03, rtol=0)
    assert (labels[negative] == 3).float().mean() == pytest.approx(1 / 3, abs=0.03)
    for number in range(64):  # every picture with a label comes
        assert (drawn == number).any()


def test_triplets_depend_on_seed_epoch_and_index_alone():
    triplets, indices = Triplets(labelled()), torch.arange(64)
    first = triplets.pictures(indices, 1, 2)
    assert torch.equal(first[[5, 3]], triplets.pictures(torch.tensor([5, 3]), 1, torch.tensor([2, 2])))
    assert not torch.equal(first, triplets.pictures(indices, 1, 3))
    assert not torch.equal(first, triplets.pictures(indices, 2, 2))


def test_pairs_are_of_one_class_or_of_two_with_equal_chances():
    pairs, labels = ClassPairs(labelled()), torch.from_numpy(LABELS)
    drawn = pairs.pictures(torch.arange(len(pairs)).repeat(40), 0, torch.arange(40).repeat_interleave(64))
    query, target = drawn.unbind(dim=1)
    same = labels[query] == labels[target]
    assert len(pairs) == 64 and (query != target).all() and (labels[drawn] >= 0).all()
    assert same.float().mean() == pytest.approx(0.5, abs=0.03)
    # Class by class; which class the query has does not say whether the target's is the same.
    for label in range(3):
        assert (labels[query] == label).float().mean() == pytest.approx(1 / 3, abs=0.03)
        assert same[labels[query] == label].float().mean() == pytest.approx(0.5, abs=0.05)
    assert (labels[target][~same] == 3).float().mean() == pytest.approx(1 / 3, abs=0.04)
    again = pairs.pictures(torch.tensor([5, 3]), 0, torch.tensor([2, 0]))
    assert torch.equal(again, drawn[[2 * 64 + 5, 3]])
    with pytest.raises(ValueError, match="no labels to make pairs of"):
        ClassPairs(ArraySource("numbers", np.zeros((4, 8, 8), np.uint8)))


def test_triplets_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="label_column"):
        Triplets(ArraySource("numbers", np.zeros((4, 8, 8), np.uint8)))
    with pytest.raises(ValueError, match="1 classes"):
        Triplets(labelled(np.zeros(4, int)))
    with pytest.raises(ValueError, match="0 of them with two pictures"):
        Triplets(labelled(np.arange(4)))


@pytest.mark.parametrize("kind", [ImageDataset, ResidentImageDataset])
def test_data_sets_hand_out_the_pictures_of_a_set(kind):
    source = labelled()
    triplets = Triplets(source)
    dataset = kind(source, processor(3), seed=5, sets=triplets)
    batch = dataset.__getitems__([(1, 7), (1, 2), (2, 7)])
    expected = triplets.pictures(torch.tensor([7, 2, 7]), 5, torch.tensor([1, 1, 2]))
    assert len(dataset) == 64 and batch["pixels"].shape == (3, 3, 1, 8, 8)
    assert torch.equal(batch["pixels"][:, :, 0, 4, 4].long(), expected)
    assert torch.equal(batch["labels"], torch.from_numpy(LABELS)[expected])
    assert batch["indices"].tolist() == [7, 2, 7]
    assert dataset.name(7, epoch=2) == ", ".join(f"picture {number} of numbers" for number in expected[2].tolist())


def pairs(tmp_path, broken: tuple[int, str] | None = None) -> TableSource:
    """Six rows with a left and a right picture, 10 * row and 10 * row + 1 bright."""
    table: dict = {"left": [], "right": [], "label": list(range(6))}
    for row in range(6):
        for place, column in enumerate(("left", "right")):
            path = tmp_path / f"{column}{row}.png"
            Image.new("L", (8, 8), 10 * row + place).save(path)
            if (row, column) == broken:
                path.write_bytes(b"no picture")
            table[column].append(str(path))
    features = datasets.Features(
        {"left": datasets.Image(), "right": datasets.Image(), "label": datasets.Value("int64")}
    )
    folder = tmp_path / "table"
    folder.mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "train.parquet")
    return load_images(str(folder), image_column="left,right", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", [ImageDataset, ResidentImageDataset])
def test_the_columns_of_a_row_stay_together(kind, tmp_path):
    source = pairs(tmp_path)
    dataset = kind(source, processor(2), sets=Rows(source))
    batch = dataset.__getitems__([(0, 5), (0, 0)])
    assert len(dataset) == 6 and len(source) == 12
    assert batch["pixels"][:, :, 0, 4, 4].tolist() == [[50, 51], [0, 1]]
    assert batch["labels"].tolist() == [[5, 5], [0, 0]]


def test_a_pair_with_a_bad_picture_is_replaced_by_a_whole_pair(tmp_path):
    source = pairs(tmp_path, broken=(2, "right"))
    dataset = ImageDataset(source, processor(2), max_bad_share=0.5, sets=Rows(source))
    batch = dataset.__getitems__([(0, 2), (0, 1)])
    assert batch["pixels"][:, :, 0, 4, 4].tolist() == [[30, 31], [10, 11]]
    assert batch["indices"].tolist() == [3, 1]
    assert len(batch["bad"]) == 1 and "right2.png" in batch["bad"][0]
    with pytest.raises(ValueError, match="resident_data false"):
        ResidentImageDataset(source, processor(2), max_bad_share=0.5, sets=Rows(source))


def test_a_source_of_single_pictures_has_no_rows():
    with pytest.raises(ValueError, match="--image_column left,right"):
        Rows(labelled())


def test_a_wrong_column_of_several_is_named(tmp_path):
    pairs(tmp_path)
    with pytest.raises(ValueError, match="'rihgt' is no column"):
        load_images(str(tmp_path / "table"), image_column="left,rihgt", cache_dir=str(tmp_path / "cache"))


def test_every_method_says_what_it_learns_from():
    for variant in (variant for variant in CATALOGUE.values() if variant.kind in ("model", "procedure")):
        if variant.config.modality == "image":
            assert variant.config.sample in {"picture", "stereo", *SAMPLES}


def test_pairs_are_neither_streamed_nor_cached(tmp_path):
    source = pairs(tmp_path)
    with pytest.raises(ValueError, match="leave out --streaming"):
        MODALITY.training_set(
            source, processor(2), args=None, data=SimpleNamespace(streaming=True), config=SimpleNamespace(sample="row")
        )
    with pytest.raises(ValueError, match="2 pictures in a row"):
        write_cache({"train": source}, tmp_path / "small")


def clips(lengths: list[int], tmp_path) -> FolderSource:
    """A folder of clips whose every pixel tells the clip (tens) and the frame."""
    for clip, length in enumerate(lengths):
        (tmp_path / "clips" / f"clip{clip}").mkdir(parents=True)
        for frame in range(length):
            Image.new("L", (8, 8), 60 * clip + frame).save(tmp_path / "clips" / f"clip{clip}" / f"{frame:03}.png")
    return load_images(str(tmp_path / "clips"))


def test_frames_come_from_one_clip_in_order_with_a_gap_in_the_range():
    source = ArraySource("clips", np.zeros((2 * 60, 8, 8), np.uint8), pictures_per_row=60)
    pairs = FramePairs(source)
    drawn = pairs.pictures(torch.arange(2).repeat(4000), 0, torch.arange(4000).repeat_interleave(2))
    first, second = drawn.unbind(dim=1)
    gap = second - first
    assert len(pairs) == 2 and torch.equal(first // 60, second // 60)
    assert torch.equal(first // 60, torch.arange(2).repeat(4000))
    assert set(gap.tolist()) == set(range(4, 48)), "uniform in [4, 48)"
    counts = gap.bincount()[4:].float()
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()
    wide = drawn[gap == 47] % 60
    assert set(wide[:, 0].tolist()) == set(range(13)), "the earlier frame is anywhere where the later one fits"


def test_short_clips_have_shorter_gaps_and_single_frames_none(tmp_path):
    source = clips([2, 1, 6, 3], tmp_path)
    pairs = FramePairs(source)
    drawn = pairs.pictures(torch.arange(3).repeat(200), 0, torch.arange(200).repeat_interleave(3)).unflatten(
        0, (200, 3)
    )
    assert source.clips().tolist() == [0, 2, 3, 9, 12] and len(pairs) == 3
    gaps = drawn[..., 1] - drawn[..., 0]
    assert [sorted(set(column.tolist())) for column in gaps.unbind(dim=1)] == [[1], [4, 5], [2]]
    assert drawn[:, 0].unique().tolist() == [0, 1] and drawn[:, 2].unique().tolist() == [9, 11]
    nearer = FramePairs(source, (1, 2)).pictures(torch.arange(3), 0, 0)
    assert (nearer[:, 1] - nearer[:, 0]).tolist() == [1, 1, 1]


def test_frame_pairs_depend_on_seed_epoch_and_index_alone():
    pairs = FramePairs(ArraySource("clips", np.zeros((20 * 30, 8, 8), np.uint8), pictures_per_row=30))
    first = pairs.pictures(torch.arange(20), 1, 2)
    assert torch.equal(first[[5, 3]], pairs.pictures(torch.tensor([5, 3]), 1, torch.tensor([2, 2])))
    assert not torch.equal(first, pairs.pictures(torch.arange(20), 1, 3))


@pytest.mark.parametrize("kind", [ImageDataset, ResidentImageDataset])
def test_data_sets_hand_out_frames_of_a_folder(kind, tmp_path):
    source = clips([5, 4], tmp_path)
    pairs = FramePairs(source, (2, 3))
    settings = {"strategy": "frames", "num_channels": 1, "mask_unit": 4, "mask_ratio": 0.5}
    frames = CropPairImageProcessor(8, **settings)
    batch = kind(source, frames, seed=5, sets=pairs).__getitems__([(1, 1), (0, 0)])
    expected = pairs.pictures(torch.tensor([1, 0]), 5, torch.tensor([1, 0]))
    found = batch["pixels"][:, :, 0, 4, 4].long()
    assert torch.equal(found // 60, torch.tensor([[1, 1], [0, 0]]))
    assert torch.equal(found % 60 + 5 * (found // 60), expected) and (found[:, 1] - found[:, 0] == 2).all()


def test_what_are_no_clips_and_no_gaps_is_refused():
    with pytest.raises(ValueError, match="folder of its own"):
        FramePairs(labelled())
    clip = ArraySource("clip", np.zeros((6, 8, 8), np.uint8), pictures_per_row=3)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        FramePairs(clip, (4, 4))
    with pytest.raises(ValueError, match="frame_gap is for"):
        make_sets("row", clip, [4, 48])
    assert make_sets("frames", clip, [1, 2]).pictures(torch.arange(2), 0, 0).diff(dim=1).tolist() == [[1], [1]]


def test_clips_of_single_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two frames or more"):
        FramePairs(clips([1, 1], tmp_path))
