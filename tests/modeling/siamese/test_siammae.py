"""SiamMAE: CropMAE's network on frames of clips (section 11 of CropMAE's spec); the pairs are tested in
`tests/data/test_sets.py`, crop and flip of both in `tests/processing/test_crop_pairs.py`."""

from pathlib import Path

import torch
from PIL import Image

from hf_masked import CropMAEForPreTraining, CropPairImageProcessor, SiamMAEConfig, SiamMAEForPreTraining
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sets import make_sets
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.siamese import cropmae
from hf_masked.modeling.siamese.siammae import official_config, tiny_config
from hf_masked.training.cli import main
from tests.modeling.siamese.test_cropmae import official_checkpoint
from tests.modeling.siamese.views import views

ROOT = Path(__file__).parents[3]


def test_the_network_is_cropmaes():
    torch.manual_seed(0)
    theirs = CropMAEForPreTraining(cropmae.tiny_config()).eval()
    ours = SiamMAEForPreTraining(tiny_config()).eval()
    ours.load_state_dict(theirs.state_dict())
    pixel_values, mask = views(2), theirs(views(2)).mask
    assert torch.equal(ours(pixel_values, mask).loss, theirs(pixel_values, mask).loss)


def test_nine_of_196_patches_are_visible_and_the_processor_takes_frames():
    processor = CropPairImageProcessor(**SiamMAEConfig().processor_settings())
    assert processor.strategy == "frames" and processor.crop_scale == [0.5, 1.0]
    frames = torch.randint(256, (2, 2, 3, 40, 60), dtype=torch.uint8)
    batch = processor([list(pair) for pair in frames], training=True, seed=0)
    assert ((~batch["bool_masked_pos"]).sum(dim=1) == 9).all()


def test_official_checkpoints_convert():
    official = official_checkpoint()
    config = official_config(official)
    model = SiamMAEForPreTraining(config)
    model.load_state_dict(cropmae.convert_official_weights(official, config))
    assert type(config) is SiamMAEConfig and config.mask_ratio == 0.95


def test_the_earlier_frame_is_the_one_that_is_seen_whole():
    """From frames to the model: pictures whose every pixel tells their number."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1).expand(40, 32, 32)
    source = ArraySource("clips", images.numpy(), pictures_per_row=20)
    settings = tiny_config().processor_settings() | {"image_mean": 0.0, "image_std": 1 / 255}
    processor = CropPairImageProcessor(**settings)
    data = ResidentImageDataset(source, processor, sets=make_sets("frames", source))
    batch = data.__getitems__([(0, 0), (0, 1), (1, 0)])
    values = processor.finish_training(batch["pixels"], batch["indices"], 0, 0)["pixel_values"]
    earlier, later = values[:, :, 0, 0, 0].round().unbind(dim=1)
    assert ((later - earlier >= 4) & (later - earlier < 20)).all()


def test_the_program_trains_on_a_folder_of_clips(tmp_path):
    for clip in range(8):
        (tmp_path / "clips" / f"clip{clip}").mkdir(parents=True)
        for frame in range(6):
            picture = torch.randint(256, (40, 48, 3), dtype=torch.uint8).numpy()
            Image.fromarray(picture).save(tmp_path / "clips" / f"clip{clip}" / f"{frame:03}.png")
    flags = ["--config", str(ROOT / "recipes" / "siammae_vit_tiny.yaml"), "--dataset_name", str(tmp_path / "clips")]
    flags += ["--frame_gap", "2", "4", "--model.backbone_config.num_hidden_layers", "1", "--use_cpu", "true"]
    flags += ["--max_steps", "3", "--per_device_train_batch_size", "4", "--picture_every_epochs", "1"]
    flags += ["--dataloader_num_workers", "0", "--disable_tqdm", "true", "--save_strategy", "no"]
    trainer = main([*flags, "--output_dir", str(tmp_path / "run")])
    gaps = trainer.train_dataset.sets.pictures(torch.arange(8), 0, 0).diff(dim=1)
    assert trainer.state.global_step == 3 and set(gaps.flatten().tolist()) == {2, 3}
    assert list((tmp_path / "run" / "pictures").glob("step-*.png"))
    assert SiamMAEForPreTraining.from_pretrained(tmp_path / "run").config.mask_ratio == 0.95
