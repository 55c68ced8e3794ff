import json

import pytest
import torch
from transformers import (
    AutoModel,
    BeitConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_masked import MAEConfig, MAEForPreTraining, MAEModel, MaskedImageProcessor
from hf_masked.evaluation.features import ImageSettings, extract_features, load_encoder, raw_pixels

VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
TOKENS = {
    "vit": (ViTConfig(**VIT, intermediate_size=16), 1),
    "deit": (DeiTConfig(**VIT, intermediate_size=16), 2),
    "dinov2": (Dinov2Config(**VIT, mlp_ratio=2), 1),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**VIT, mlp_ratio=2, num_register_tokens=3), 4),
    "beit": (BeitConfig(**VIT, intermediate_size=16), 1),
    "swin": (SwinConfig(embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=8, patch_size=2), 0),
}
MAPS = {
    "resnet": ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
    "convnext": ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, patch_size=2),
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture
def images():
    return torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(images):
    return (images.double() / 255).sub(torch.tensor(MEAN).view(3, 1, 1)).div(torch.tensor(STD).view(3, 1, 1)).float()


def build(config):
    torch.manual_seed(0)
    return AutoModel.from_config(config)


@pytest.mark.parametrize("name", TOKENS)
def test_mean_of_patch_tokens(name, images):
    config, prefix = TOKENS[name]
    model = build(config).eval()
    with torch.no_grad():
        hidden = model(normalised(images)).last_hidden_state
    features = extract_features(model, images, mean=MEAN, std=STD, pooling="mean", batch_size=2)
    assert features.dtype == torch.float32 and hidden.shape[1] == prefix + 4
    torch.testing.assert_close(features, hidden[:, prefix:].mean(dim=1), rtol=1e-4, atol=1e-5)
    auto = extract_features(model, images, mean=MEAN, std=STD)
    torch.testing.assert_close(auto, features, rtol=1e-4, atol=1e-5)
    if prefix:
        first = extract_features(model, images, mean=MEAN, std=STD, pooling="cls")
        torch.testing.assert_close(first, hidden[:, 0], rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="no class token"):
            extract_features(model, images, mean=MEAN, std=STD, pooling="cls")


@pytest.mark.parametrize("name", MAPS)
def test_maps(name, images):
    model = build(MAPS[name]).eval()
    with torch.no_grad():
        outputs = model(normalised(images))
    mean = extract_features(model, images, mean=MEAN, std=STD, pooling="mean")
    torch.testing.assert_close(mean, outputs.last_hidden_state.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    auto = extract_features(model, images, mean=MEAN, std=STD)
    torch.testing.assert_close(auto, outputs.pooler_output.flatten(1), rtol=1e-4, atol=1e-5)


def test_modes_are_restored_and_batch_norm_untouched(images):
    model = build(MAPS["resnet"]).train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = extract_features(model, images, mean=MEAN, std=STD)
    assert model.training and not frozen.training and not features.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_size_and_gray(images):
    model = build(TOKENS["vit"][0]).eval()
    gray = images[:, :1]
    resized = extract_features(model, gray, mean=MEAN, std=STD, size=(16, 8))
    assert resized.shape == (5, 8)
    repeated = extract_features(model, gray.expand(-1, 3, -1, -1), mean=MEAN, std=STD, size=(16, 8))
    assert torch.equal(resized, repeated)


def test_models_of_this_package_are_judged_by_their_backbone(images):
    torch.manual_seed(0)
    model = MAEModel(MAEConfig(backbone_config=TOKENS["vit"][0])).eval()
    with torch.no_grad():
        expected = model.backbone(normalised(images)).last_hidden_state[:, 1:].mean(dim=1)
    features = extract_features(model, images, mean=MEAN, std=STD)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_wrong_input(images):
    model = build(TOKENS["vit"][0])
    with pytest.raises(ValueError, match="uint8"):
        extract_features(model, images.float(), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="2 channels"):
        extract_features(model, images[:, :2], mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="pooling is 'max'"):
        extract_features(model, images, mean=MEAN, std=STD, pooling="max")


def test_load_encoder_of_this_package(tmp_path, images):
    torch.manual_seed(0)
    model = MAEForPreTraining(MAEConfig(backbone_config=TOKENS["vit"][0]))
    model.save_pretrained(tmp_path)
    MaskedImageProcessor(size=8, mask_unit=4, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    encoder, settings = load_encoder(str(tmp_path))
    assert isinstance(encoder, ViTModel) and not encoder.training
    assert settings == ImageSettings(MEAN, STD, (8, 8)) and settings.num_channels == 3
    expected = extract_features(model, images, mean=MEAN, std=STD)
    assert torch.equal(extract_features(encoder, images, mean=MEAN, std=STD), expected)


def test_load_encoder_without_pooler_or_processor(tmp_path, images):
    ViTModel(TOKENS["vit"][0], add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json"):
        encoder, settings = load_encoder(str(tmp_path))
    assert encoder.pooler is None and settings.size == (8, 8)
    with pytest.raises(ValueError, match="no pooler"):
        extract_features(encoder, images, mean=MEAN, std=STD, pooling="pooler")


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        ({"size": {"height": 8, "width": 16}}, (8, 16)),
        ({"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, (8, 8)),
        ({"size": {"shortest_edge": 8}}, (8, 8)),
    ],
)
def test_settings_of_stock_processors(processor, size, tmp_path):
    build(TOKENS["vit"][0]).save_pretrained(tmp_path)
    settings = processor | {"image_mean": list(MEAN), "image_std": list(STD)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_encoder(str(tmp_path))[1] == ImageSettings(MEAN, STD, size)


def test_an_incomplete_encoder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    build(TOKENS["vit"][0]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "cls_token" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="whole ViTModel"):
        load_encoder(str(tmp_path))


@pytest.mark.filterwarnings("ignore:.*preprocessor_config")
def test_the_whole_picture_is_seen_by_vit_mae(tmp_path, images):
    ViTMAEForPreTraining(ViTMAEConfig(**VIT, intermediate_size=16)).save_pretrained(tmp_path)
    encoder, _ = load_encoder(str(tmp_path))
    first, second = (extract_features(encoder, images, mean=MEAN, std=STD) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_raw_pixels(images):
    assert torch.equal(raw_pixels(images)[1], images[1].reshape(-1) / 255)
