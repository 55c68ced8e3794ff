"""The image processor of transformers that treats a picture as ours does without training."""

import json
from pathlib import Path

from hf_masked.processing.image_processing import PretrainingImageProcessor


def stock_settings(processor: PretrainingImageProcessor) -> dict:
    """Settings, as `preprocessor_config.json` has them, of a stock image processor.

    Square inputs resize the short side and crop the centre (`CLIPImageProcessor`, which every version of transformers
    has); for other shapes, where stock processors would pad, pictures are resized to the size (`ViTImageProcessor`).
    """
    height, width = processor.size["height"], processor.size["width"]
    settings = {
        "do_convert_rgb": processor.num_channels == 3,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "resample": processor.resample,
        "rescale_factor": 1 / 255,
    }
    if height != width:
        return settings | {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    return settings | {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": round(height / processor.crop_fraction)},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }


def save_stock_processor(processor: PretrainingImageProcessor, output: str | Path, **settings) -> None:
    """Writes `preprocessor_config.json` into a folder; `settings` override `stock_settings(processor)`."""
    text = json.dumps(stock_settings(processor) | settings, indent=2, sort_keys=True)
    (Path(output) / "preprocessor_config.json").write_text(text + "\n")
