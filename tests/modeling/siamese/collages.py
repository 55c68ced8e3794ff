"""Pictures that are known: a digit at a random place and scale on a canvas with a texture, and where it is."""

import torch
from torch.nn import functional as F

from hf_masked import CropMAEConfig, CropMAEForPreTraining, CropPairImageProcessor
from hf_masked.data.small_sets import digits
from hf_masked.modeling.parts.backbones import tiny_vit

SIDE = 40


def collages(count: int, split: str = "train", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (count, 1, 40, 40), and the digit's pixels as 255, of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(digits(split)[1]).float()[:, None] / 255
    coarse = torch.rand(count, 1, 8, 8, generator=generator)
    canvas = 0.5 * F.interpolate(coarse, SIDE, mode="bicubic").clamp(0, 1)
    masks = torch.zeros_like(canvas)
    for number in range(count):
        side = int(torch.randint(14, 25, (), generator=generator))
        top, left = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
        item = images[int(torch.randint(len(images), (), generator=generator))][None]
        item = F.interpolate(item, side, mode="bilinear")[0]
        place = (number, slice(None), slice(top, top + side), slice(left, left + side))
        masks[place] = (item > 0.3).float()
        canvas[place] = torch.where(item > 0.3, 0.5 + 0.5 * item, canvas[place])
    return (255 * canvas).byte(), (255 * masks).byte()


def processor_for(config: CropMAEConfig, **settings) -> CropPairImageProcessor:
    settings = {"crop_scale": (0.4, 1.0), "image_mean": 0.35, "image_std": 0.25} | settings
    return CropPairImageProcessor(**config.processor_settings() | settings)


def trained(
    steps: int, pictures: torch.Tensor, seed: int = 0, **settings
) -> tuple[CropMAEForPreTraining, list[float]]:
    """A small CropMAE after so many steps on pairs of the pictures, and its losses.

    Args:
        settings: of the processor.
    """
    torch.manual_seed(seed)
    config = CropMAEConfig(
        backbone_config=tiny_vit(hidden_size=64, num_hidden_layers=3, patch_size=4, num_channels=1),
        mask_ratio=0.96,  # 2 of 64 patches stay
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        decoder_dropout=0.0,
    )
    model, processor = CropMAEForPreTraining(config).train(), processor_for(config, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for step in range(steps):
        indices = torch.randint(len(pictures), (32,), generator=torch.Generator().manual_seed(step))
        pixels = processor.prepare_training(pictures[indices], indices, seed, step)
        loss = model(**processor.finish_training(pixels, indices, seed, step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses
