"""The processor of clips: which frames, one crop and one flip for all of them, repeats, masks; videos of all kinds."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked import MaskedVideoProcessor
from hf_masked.extras import MissingPackageError
from hf_masked.processing.decoding import BadImageError
from hf_masked.processing.video_decoding import ArrayVideo, FrameFolder, VideoFile, load_av, open_video


def processor(**settings) -> MaskedVideoProcessor:
    defaults = {"size": 16, "mask_unit": (2, 8, 8), "mask_ratio": 0.75, "num_frames": 8, "sampling_rate": 2}
    return MaskedVideoProcessor(**defaults | settings)


def numbered(length: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """uint8 (frames, 3, height, width): each frame's pixels are its number."""
    return torch.arange(length, dtype=torch.uint8).view(-1, 1, 1, 1).expand(length, 3, height, width)


def numbers_of(pixel_values: torch.Tensor) -> torch.Tensor:
    """The frames' numbers, read back from normalised values (..., frames, 3, height, width)."""
    return ((pixel_values[..., 0, 0, 0] * 0.225 + 0.45) * 255).round().long()


def test_frames_are_chosen_as_in_the_reference():
    """At 30 frames per second a clip of 16 x 4 spans 64 frames, which makes steps of 63 / 15."""
    p = processor(num_frames=16, sampling_rate=4)
    video = ArrayVideo(numbered(100), fps=30.0)
    steps = torch.linspace(0, 63, 16).long()
    assert p.frame_numbers(video, torch.tensor([0.0]))[0].tolist() == steps.tolist()
    assert p.frame_numbers(video, None)[0].tolist() == (steps + 18).tolist()  # (100 - 64) // 2
    # The start is a real number, cut off after the step is added.
    expected = torch.linspace(12.5, 75.5, 16).long()
    assert p.frame_numbers(video, torch.tensor([12.5 / 36]))[0].tolist() == expected.tolist()
    # Other rates: as long in seconds. A short video repeats its last frame.
    assert p.frame_numbers(ArrayVideo(numbered(100), fps=15.0), torch.tensor([0.0]))[0, -1] == 31
    assert p.frame_numbers(ArrayVideo(numbered(10), fps=30.0), torch.tensor([0.9]))[0].tolist()[-3:] == [9, 9, 9]
    # Who does not know the rate counts frames.
    assert p.frame_numbers(ArrayVideo(numbered(100)), torch.tensor([0.0]))[0, -1] == 63


def test_clips_begin_anywhere_and_repeats_are_different_clips_of_one_video():
    p = processor(repeated_samples=4, crop_scale=(1, 1), crop_ratio=(1, 1))
    batch = p([numbered(100)] * 50, training=True, seed=0)
    assert batch["pixel_values"].shape == (50, 4, 8, 3, 16, 16) and batch["bool_masked_pos"].shape == (50, 4, 16)
    numbers = numbers_of(batch["pixel_values"])
    starts = numbers[..., 0]
    assert starts.min() < 8 and starts.max() > 75  # of 0 to 84
    assert (starts.sort(dim=1).values.diff(dim=1) > 0).float().mean() > 0.9
    assert (numbers.diff(dim=-1) > 0).all() and (numbers[..., -1] - starts <= 16).all()
    masks = batch["bool_masked_pos"]
    assert (masks.sum(dim=-1) == 12).all() and (masks[:, 0] != masks[:, 1]).any()


def test_all_frames_of_a_clip_have_one_crop_and_one_flip():
    """Of a still video all frames stay alike; over clips crops and flips differ."""
    still = torch.randint(256, (1, 3, 40, 60), dtype=torch.uint8).expand(30, 3, 40, 60)
    p = processor(repeated_samples=16)
    clips = p([still], training=True, seed=0)["pixel_values"][0]
    assert (clips == clips[:, :1]).all()
    assert len(torch.unique(clips[:, 0].flatten(1), dim=0)) == 16
    mirrored = processor(flip_probability=1.0, crop_scale=(1, 1), crop_ratio=(1, 1), antialias=True)
    plain = processor(flip_probability=0.0, crop_scale=(1, 1), crop_ratio=(1, 1), antialias=True)
    square = still[..., :40]
    assert torch.equal(
        mirrored([square], training=True, seed=0)["pixel_values"],
        plain([square], training=True, seed=0)["pixel_values"].flip(-1),
    )


def test_everything_drawn_is_a_function_of_seed_epoch_and_index():
    p = processor(repeated_samples=2)
    videos = [torch.randint(256, (30, 3, 20, 24), dtype=torch.uint8) for _ in range(4)]
    whole = p.prepare_training(videos, torch.arange(4), 7, torch.tensor([3, 3, 3, 3]))
    part = p.prepare_training([videos[2]], torch.tensor([2]), 7, 3)
    assert torch.equal(whole[2:3], part)
    assert not torch.equal(p.prepare_training([videos[2]], torch.tensor([2]), 7, 4), part)
    finished = p.finish_training(whole, torch.arange(4), 7, 3)
    alone = p.finish_training(part, torch.tensor([2]), 7, 3)
    for name, value in alone.items():
        assert torch.equal(finished[name][2:3], value), name


def test_without_training_a_video_gives_its_middle_once():
    p = processor(repeated_samples=4, crop_fraction=0.5)
    frames = torch.zeros(40, 3, 32, 48, dtype=torch.uint8)
    frames[:, :, 8:24, 16:32] = 255  # the central square of half the height
    batch = p([frames])
    assert batch["pixel_values"].shape == (1, 8, 3, 16, 16) and batch["bool_masked_pos"].shape == (1, 16)
    torch.testing.assert_close(batch["pixel_values"], torch.full((1, 8, 3, 16, 16), (1 - 0.45) / 0.225))
    assert not torch.equal(p([frames], seed=4)["bool_masked_pos"], p([frames], seed=5)["bool_masked_pos"])


def test_a_resize_is_the_bilinear_one_of_the_reference():
    """Without antialiasing: halving the size takes means of two by two pixels, quartering leaves most pixels out."""
    frames = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8)
    found = processor(crop_fraction=1.0, num_frames=16, sampling_rate=1).prepare([frames])[0]
    expected = torch.nn.functional.interpolate(frames.float(), size=(16, 16), mode="bilinear")
    assert (found.float() - expected).abs().max() <= 1
    smooth = processor(crop_fraction=1.0, num_frames=16, sampling_rate=1, antialias=True).prepare([frames])[0]
    assert (smooth.float() - expected).abs().max() > 20


@pytest.mark.parametrize("kind", ["array", "channels last", "pictures", "gray", "folder", "batch"])
def test_videos_come_in_many_forms(kind, tmp_path):
    frames = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    channels = 1 if kind == "gray" else 3
    p = processor(num_channels=channels, crop_fraction=1.0)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    if kind == "folder":
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / f"{number:03}.png")
    videos = {
        "array": frames,
        "channels last": frames.permute(0, 2, 3, 1).numpy(),
        "pictures": pictures,
        "gray": frames[:, 0].numpy(),
        "folder": str(tmp_path),
        "batch": frames.unsqueeze(0),
    }[kind]
    found = p(videos)["pixel_values"]
    expected = p.finish(frames[p.frame_numbers(ArrayVideo(frames), None)][:, :, :channels])["pixel_values"]
    assert torch.equal(found, expected)


def test_settings_survive_a_round_trip(tmp_path):
    p = processor(target_fps=None, repeated_samples=3, mask_kind="tube", antialias=True)
    p.save_pretrained(tmp_path)
    found = MaskedVideoProcessor.from_pretrained(tmp_path)
    assert found.to_dict() == p.to_dict() and found.target_fps is None
    with pytest.raises(ValueError, match="repeated_samples is 0"):
        processor(repeated_samples=0)
    with pytest.raises(ValueError, match="does not divide the size 7 x 16 x 16"):
        processor(num_frames=7)
    with pytest.raises(ValueError, match="mask_kind is 'block', a mask of pictures"):
        processor(mask_kind="block")


def test_the_plain_processor_treats_clips_alike(tmp_path):
    from transformers import VivitImageProcessor

    p = processor(crop_fraction=0.875)
    p.save_plain(tmp_path)
    plain = VivitImageProcessor.from_pretrained(tmp_path)
    frames = (128 + 100 * torch.sin(torch.linspace(0, 3, 24)).outer(torch.cos(torch.linspace(0, 4, 24)))).to(
        torch.uint8
    )
    video = frames.expand(20, 3, 24, 24)
    theirs = plain([frame.permute(1, 2, 0).numpy() for frame in video[:8]], return_tensors="pt")["pixel_values"]
    ours = p(video)["pixel_values"]
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 0.3


def written_video(path: Path, frames: np.ndarray) -> Path:
    """A file of uint8 frames (n, height, width, 3) with few key frames and B-frames."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.gop_size, stream.max_b_frames = 7, 2
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_frames_of_a_file_are_the_ones_that_are_asked_for(suffix, tmp_path):
    levels = np.arange(30, dtype=np.uint8) * 8
    frames = np.broadcast_to(levels[:, None, None, None], (30, 32, 48, 3)).copy()
    path = written_video(tmp_path / f"clip{suffix}", frames)
    with load_av().open(str(path)) as container:
        expected = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    assert np.abs([frame.mean() for frame in expected] - levels).max() < 12  # the coding loses something
    video = VideoFile(path)
    assert video.num_frames == 30 and video.fps == 25
    for numbers in ([0], [5, 9, 22], [28, 29], list(range(30))):
        for number, frame in zip(numbers, video.frames(numbers), strict=True):
            assert np.array_equal(np.asarray(frame), expected[number])
    batch = processor()([str(path)], training=True)
    assert batch["pixel_values"].shape == (1, 8, 3, 16, 16)


def test_what_is_no_video_is_named(tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(BadImageError, match=r"broken\.mp4: InvalidDataError"):
        open_video(tmp_path / "broken.mp4")
    with pytest.raises(BadImageError, match=r"missing\.mp4"):
        open_video(tmp_path / "missing.mp4")
    with pytest.raises(BadImageError, match=r"an array of torch\.float32"):
        ArrayVideo(torch.zeros(3, 4, 4))
    with pytest.raises(BadImageError, match="no frames"):
        ArrayVideo([])
    for number, size in enumerate([(8, 8), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    folder = FrameFolder(sorted(tmp_path.glob("*.png")), "two sizes")
    with pytest.raises(BadImageError, match="two sizes: frames of several sizes"):
        processor()([folder])


def test_without_pyav_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"^This needs av.*pip install 'hf-masked\[video\]'"):
        VideoFile("clip.mp4")
