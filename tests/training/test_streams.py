"""Runs on large folders and streams go on with the next sample, and decode nothing that was used."""

import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import ViTConfig

from hf_masked import MAEConfig, MAEForPreTraining, MaskedImageProcessor
from hf_masked.data import ImageDataset, StreamingImageDataset, StreamPosition, bad_images, load_images
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.trainer import PreTrainer

ROWS = 24


@pytest.fixture(autouse=True)
def local_cache(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def jpeg(value):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((20, 16)).rotate(value).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    pyarrow.parquet.write_table(pa.table({"image": [jpeg(value) for value in range(ROWS)]}), folder / "0.parquet")
    return load_images(str(folder), streaming=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    for value in range(320):
        (folder / f"{value:03}.jpg").write_bytes(jpeg(value % 7))
    return load_images(str(folder))


def trainer_of(dataset, source, output, **settings):
    backbone_config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MAEForPreTraining(MAEConfig(backbone_config=backbone_config, decoder_hidden_size=32))
    processor = MaskedImageProcessor(**model.config.processor_settings())
    args = PreTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        **{"per_device_train_batch_size": 4, "max_steps": 10, "save_steps": 8, "dataloader_num_workers": 0} | settings,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    return PreTrainer(
        model=model, args=args, processing_class=processor, train_dataset=dataset(source, processor, args.seed)
    )


def train(trainer, checkpoint=None):
    """The lines of the log, without speeds, and the weights."""
    torch.manual_seed(trainer.args.max_steps)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    lines = [(line["step"], line["epoch"], line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return lines, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_run(first, second):
    assert first[0] == second[0]
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_resumed_in_its_second_pass_equals_an_uninterrupted_run(stream, tmp_path, num_workers):
    settings = {"dataloader_num_workers": num_workers, "gradient_accumulation_steps": 2, "save_steps": 5}
    whole = train(trainer_of(StreamingImageDataset, stream, tmp_path / "whole", **settings))
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    assert json.loads((checkpoint / "stream_0.json").read_text())["epoch"] == 1
    resumed = trainer_of(StreamingImageDataset, stream, tmp_path / "resumed", **settings)
    assert_same_run(whole, train(resumed, checkpoint))


def test_a_stream_begins_anew_when_told_to(stream, tmp_path):
    train(trainer_of(StreamingImageDataset, stream, tmp_path / "whole"))
    anew = trainer_of(StreamingImageDataset, stream, tmp_path / "anew", ignore_data_skip=True)
    train(anew, tmp_path / "whole" / "checkpoint-8")
    assert anew.train_dataset.position == StreamPosition(0, {0: 8}, 0)
    assert anew.args.ignore_data_skip


def test_another_number_of_workers_is_refused(stream, tmp_path):
    train(trainer_of(StreamingImageDataset, stream, tmp_path / "whole"))
    other = trainer_of(StreamingImageDataset, stream, tmp_path / "other", dataloader_num_workers=2)
    with pytest.raises(ValueError, match=r"dataloader_num_workers=0, this run has 2.*ignore_data_skip"):
        train(other, tmp_path / "whole" / "checkpoint-8")
    (tmp_path / "whole" / "checkpoint-8" / "stream_0.json").unlink()
    with pytest.raises(ValueError, match=r"stream_0\.json is missing.*ignore_data_skip"):
        train(other, tmp_path / "whole" / "checkpoint-8")


def test_a_stream_shorter_than_a_batch_is_named(stream, tmp_path):
    with pytest.raises(ValueError, match=r"no batch of 32 pictures.*per_device_train_batch_size"):
        train(trainer_of(StreamingImageDataset, stream, tmp_path, per_device_train_batch_size=32))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_resumed_in_the_middle_decodes_only_what_is_left(folder, tmp_path, monkeypatch, num_workers):
    settings = {"dataloader_num_workers": num_workers, "per_device_train_batch_size": 32, "num_train_epochs": 2}
    settings |= {"max_steps": -1, "save_steps": 17}
    whole = train(trainer_of(ImageDataset, folder, tmp_path / "whole", **settings))
    decoded = torch.zeros((), dtype=torch.int64).share_memory_()
    decode = bad_images.decode_picture

    def counted(*arguments):
        decoded.add_(1)
        return decode(*arguments)

    monkeypatch.setattr(bad_images, "decode_picture", counted)
    resumed = trainer_of(ImageDataset, folder, tmp_path / "resumed", **settings)
    assert_same_run(whole, train(resumed, tmp_path / "whole" / "checkpoint-17"))
    # Three batches; two workers may count at the same moment.
    assert 3 * 32 - 10 <= int(decoded) <= 3 * 32
