"""Out into the ecosystem: plain checkpoints, pipelines, ONNX."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, ViTConfig, pipeline

from hf_masked import MAEConfig, MAEForPreTraining, MaskedImageProcessor
from hf_masked.training.export import export_encoder


def model_and_processor(channels: int = 3, size=(32, 32), **settings):
    backbone_config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=size,
        patch_size=8, num_channels=channels,
    )  # fmt: skip
    model = MAEForPreTraining(MAEConfig(backbone_config=backbone_config, decoder_hidden_size=32)).eval()
    # A fraction at which the stock processor's short side is a whole number: 32 / 0.8 = 40.
    return model, MaskedImageProcessor(**model.config.processor_settings(), crop_fraction=0.8, **settings)


def photograph(height: int, width: int) -> Image.Image:
    """Smooth, so that the resizing filters of different libraries agree."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    channels = [np.sin(5 * x + phase) * np.cos(4 * y) * 100 + 128 for phase in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_stock_processor_gives_the_same_pixels(size, tmp_path):
    model, processor = model_and_processor(size=size)
    export_encoder(model, processor, tmp_path)
    picture = photograph(90, 90 * size[1] // size[0])
    if size[0] != size[1]:
        processor.crop_fraction = 1.0  # the stock processor for rectangles takes the whole picture
    ours = processor(picture)["pixel_values"]
    stock = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    assert stock.shape == ours.shape
    assert (stock - ours).abs().mean() < 0.03


def test_feature_pipeline_serves_the_export(tmp_path):
    model, processor = model_and_processor()
    export_encoder(model, processor, tmp_path)
    features = torch.tensor(pipeline("image-feature-extraction", model=str(tmp_path))(photograph(60, 80)))
    assert features.shape == (1, 17, 32)


def test_gray_encoder_serves_rgb_after_folding(tmp_path):
    model, processor = model_and_processor(channels=1)
    export_encoder(model, processor, tmp_path, rgb=True)
    gray = photograph(80, 80).convert("L")
    with torch.no_grad():
        expected = model.backbone(processor(gray)["pixel_values"]).last_hidden_state
    found = torch.tensor(pipeline("image-feature-extraction", model=str(tmp_path))(gray))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert model.backbone.config.num_channels == 1, "the model in memory stays as it was"


def test_folding_other_channels_is_refused(tmp_path):
    model, processor = model_and_processor(channels=4)
    with pytest.raises(ValueError, match="takes 4 channels"):
        export_encoder(model, processor, tmp_path, rgb=True)


def test_rectangular_encoder_of_many_channels_exports(tmp_path):
    model, processor = model_and_processor(channels=13, size=(64, 32))
    export_encoder(model, processor, tmp_path)
    pixel_values = torch.randn(2, 13, 64, 32)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    torch.testing.assert_close(plain(pixel_values).last_hidden_state, model.backbone(pixel_values).last_hidden_state)


def test_encoder_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, processor = model_and_processor()
    export_encoder(model, processor, tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    path = str(tmp_path / "encoder.onnx")
    torch.onnx.export(plain, (pixel_values,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(path)
    batch = torch.randn(5, 3, 32, 32)
    found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, plain(batch).last_hidden_state.numpy(), rtol=1e-3, atol=1e-4)
