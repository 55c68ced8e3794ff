"""MFM against its reference, and every check of its spec (section 11)."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    ConvNextConfig,
    ConvNextV2Config,
    DeiTConfig,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
    ViTConfig,
    ViTModel,
)

from hf_masked import MaskedImageProcessor, MFMConfig, MFMForPreTraining, MFMModel
from hf_masked.evaluation.features import ImageSettings
from hf_masked.evaluation.finetune import finetune
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_image.mfm import (
    convert_official_weights,
    example_inputs,
    frequency_filter,
    missing_in_low_pass,
    official_config,
    tiny_config,
)
from hf_masked.modeling.registry import get_variant
from hf_masked.training.export import export_encoder
from tests.modeling.masked_image.short_runs import PROCESSOR, fashion, pretrain
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "mfm.json").read_text())

MEAN, STD = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4}
BACKBONES = {
    "vit": ViTConfig(**VIT, image_size=64),
    "deit": DeiTConfig(**VIT, image_size=64),
    "swin": SwinConfig(**SWIN, image_size=64),
    "swinv2": Swinv2Config(**SWIN, image_size=64),
    "resnet": ResNetConfig(embedding_size=8, layer_type="bottleneck", image_size=64, **STAGES),
    "convnext": ConvNextConfig(num_stages=2, image_size=64, **STAGES),
    "convnextv2": ConvNextV2Config(num_stages=2, image_size=64, **STAGES),
}


def small_model(backbone: str = "vit", seed: int = 0, **settings) -> MFMForPreTraining:
    torch.manual_seed(seed)
    settings = {"backbone_config": BACKBONES[backbone], "mask_radius": 5} | settings
    return MFMForPreTraining(MFMConfig(**settings))


def raw_pictures(batch: int = 2, size: tuple[int, int] = (64, 64), channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def low_and_high(size: tuple[int, int], radius: float) -> torch.Tensor:
    """The masks of a low-pass and of a high-pass picture, bool (2, height * width)."""
    missing = missing_in_low_pass(size, radius).flatten()
    return torch.stack([missing, ~missing])


# The reference, through the stored values


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    reference, official = stored["config"], filled(stored["parameters"])
    size, radius = reference["img_size"], reference["mask_radius1"]
    if run == "vit":
        width = reference["embed_dim"]
        backbone_config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=reference["depth"],
            num_attention_heads=reference["num_heads"],
            intermediate_size=width * reference["mlp_ratio"],
            layer_norm_eps=reference["layer_norm_eps"],
            image_size=size,
            patch_size=reference["patch_size"],
        )
    else:
        backbone_config = official_config(official).backbone_config
        assert backbone_config.depths == reference["layers"]
    model = MFMForPreTraining(MFMConfig(backbone_config=backbone_config, mask_radius=radius)).train()
    converted = convert_official_weights(official, model.config)
    report = model.load_state_dict(converted, strict=False)
    buffers = {name for name, _ in model.named_buffers()}  # running statistics, which begin as the reference's
    assert not report.unexpected_keys and set(report.missing_keys) <= buffers
    if run == "resnet":  # in float32 batch norm makes differences of 1e-5 of the last bits
        model.double()
    pixels = (filled_pixels((stored["batch"], 3, size, size), f"{run}.pixels") + 2) / 4
    low_pass = torch.tensor(reference["low_pass"])
    output = model((pixels - MEAN) / STD, noise=torch.where(low_pass, 0.4, 0.6)[:, None])
    return stored, model, output


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours.float(), stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_filter_predictions_and_loss_are_the_references(run):
    stored, _, output = run_as_reference(run)
    assert output.mask.int().tolist() == stored["mask"]
    close(output.corrupted[:2, 0, :16], stored["corrupted"])
    close(output.reconstruction[:2, 1, :16], stored["reconstruction"])
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    features = torch.tensor(stored["features"])
    ours = output.last_hidden_state[:2]
    close(ours if ours.ndim == 4 else ours[:, 1:], (features if ours.ndim == 4 else features.flatten(2).mT).tolist())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, output = run_as_reference(run)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in stored["gradient_norms"].items():
        # Given names as values, the conversion tells which of ours make up one of the reference's.
        probe = {name: torch.zeros(stored["parameters"][name])}
        converted = [n for n in convert_official_weights(probe, model.config) if not n.endswith("k_proj.bias")]
        ours = [gradients.pop(n) for n in converted]
        assert torch.stack([g.norm() for g in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    # What the reference has not: the bias of the keys, which changes nothing.
    assert all(name.endswith("k_proj.bias") and g.abs().max() < 1e-7 for name, g in gradients.items())


def official_checkpoint(run: str) -> dict[str, torch.Tensor]:
    stored = PARITY["pretraining"][run]
    official = {name: torch.zeros(shape) for name, shape in stored["parameters"].items()}
    if run == "resnet":
        norms = {n.rsplit(".", 1)[0] for n, shape in stored["parameters"].items() if len(shape) == 1} - {"decoder.0"}
        for norm in norms:
            like = official[f"{norm}.weight"]
            official |= {f"{norm}.running_mean": like, f"{norm}.running_var": like + 1}
            official[f"{norm}.num_batches_tracked"] = torch.tensor(7)
        return official
    # A ViT of a released width, of one layer.
    wide = {}
    for name, shape in stored["parameters"].items():
        if not name.startswith(("encoder.blocks.1.", "encoder.blocks.2.")):
            sides = [384 * side // 48 if side % 48 == 0 and name != "decoder.0.weight" else side for side in shape]
            wide[name] = torch.zeros(sides)
    return wide | {"decoder.0.weight": torch.zeros(768, 384, 1, 1), "decoder.0.bias": torch.zeros(768)}


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_official_file_converts_strictly(run, tmp_path):
    official = official_checkpoint(run)
    torch.save({"model": official, "epoch": 299, "max_accuracy": 0.0}, tmp_path / "pretrain.pth")
    model = convert(get_variant("mfm"), tmp_path / "pretrain.pth")
    assert type(model) is MFMForPreTraining
    assert model.config.low_pass_probability == {"vit": 0.5, "resnet": 0.3}[run]
    if run == "resnet":
        assert model.backbone.embedder.embedder.normalization.num_batches_tracked == 7
    torch.save({"model": official | {"encoder.fc_norm.weight": torch.zeros(384)}}, tmp_path / "pretrain.pth")
    with pytest.raises(ValueError, match=r"left over: .*fc_norm\.weight"):
        convert(get_variant("mfm"), tmp_path / "pretrain.pth")


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"neither encoder\.pos_embed nor encoder\.layer1"):
        official_config({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)})


# The spec's section 11


def test_counts_of_the_papers_masks():
    low_pass, high_pass = low_and_high((224, 224), 16)
    assert low_pass.sum() == 49_383 and high_pass.sum() == 793
    assert torch.equal(low_pass, ~high_pass)
    # A band: what lies beyond the outer radius is kept, too.
    band = missing_in_low_pass((224, 224), 16, 20)
    assert torch.equal(band, missing_in_low_pass((224, 224), 16) & ~missing_in_low_pass((224, 224), 20))


@pytest.mark.parametrize("size", [(32, 32), (31, 33), (48, 24)])
def test_filter_is_linear_and_idempotent(size):
    pictures = raw_pictures(1, size)
    low_pass, high_pass = low_and_high(size, 5)[:, None]
    low, high = frequency_filter(pictures, low_pass), frequency_filter(pictures, high_pass)
    torch.testing.assert_close(low + high, pictures, rtol=0, atol=1e-5)
    torch.testing.assert_close(frequency_filter(low, low_pass), low, rtol=0, atol=1e-5)
    torch.testing.assert_close(frequency_filter(low, high_pass), torch.zeros_like(low), rtol=0, atol=1e-5)
    # The mean belongs to the low frequencies alone.
    torch.testing.assert_close(low.mean(dim=(2, 3)), pictures.mean(dim=(2, 3)), rtol=0, atol=1e-5)
    assert high.mean(dim=(2, 3)).abs().max() < 1e-5


def test_filter_knows_a_wave_by_its_cycles():
    """Three cycles per picture pass a disc of radius 4 and not its complement; five the other way round."""
    wave = torch.arange(32) * 2 * math.pi / 32
    slow, fast = ((1 + (cycles * wave).sin()).expand(1, 1, 32, 32) / 2 for cycles in (3, 5))
    low_pass = low_and_high((32, 32), 4)[:1]
    torch.testing.assert_close(frequency_filter(slow, low_pass), slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(frequency_filter(fast, low_pass), torch.full_like(fast, 0.5), rtol=0, atol=1e-5)


def test_without_missing_frequencies_the_encoder_sees_the_picture():
    model = small_model()
    pixel_values = (raw_pictures() - MEAN) / STD
    nothing = torch.zeros(2, 64 * 64, dtype=torch.bool)
    torch.testing.assert_close(model.corrupt(pixel_values, nothing), pixel_values, rtol=0, atol=1e-5)


def test_filter_works_on_pixels_from_0_to_1_and_clamps():
    model = small_model()
    pixels = raw_pictures()
    corrupted = model.corrupt((pixels - MEAN) / STD, low_and_high((64, 64), 5)) * STD + MEAN
    assert corrupted.min() > -1e-5 and corrupted.max() < 1 + 1e-5
    expected = frequency_filter(pixels, low_and_high((64, 64), 5))
    assert expected[1].min() < -0.1, "the high frequencies alone are negative at half of the pixels"
    torch.testing.assert_close(corrupted, expected.clamp(0, 1), rtol=0, atol=1e-5)


def test_parsevals_theorem():
    """With gamma 2 and all coefficients scored, the loss is the mean squared error of the pixels."""
    model = small_model(loss_gamma=2.0)
    prediction, target = torch.randn(2, 2, 3, 64, 64)
    everything = torch.ones(2, 64 * 64, dtype=torch.bool)
    expected = (prediction - target).square().mean()
    torch.testing.assert_close(model.loss(target, prediction, everything), expected, rtol=1e-5, atol=0)


def test_loss_is_the_papers_written_as_loops():
    model = small_model()
    pixel_values = (raw_pictures() - MEAN) / STD
    output = model(pixel_values, bool_masked_pos=low_and_high((64, 64), 5))
    total, count = 0.0, 0
    for sample in range(2):
        missing = output.mask[sample].view(64, 64)
        for channel in range(3):
            spectra = [
                torch.fft.fftshift(torch.fft.fft2(p[sample, channel], norm="ortho"))
                for p in (output.reconstruction, pixel_values)
            ]
            total += (spectra[0] - spectra[1]).abs()[missing].sum()
        count += missing.sum()
    # One ratio for the whole batch, which low-pass pictures rule.
    torch.testing.assert_close(output.loss, total / count / 3, rtol=1e-5, atol=0)


def test_gradient_has_no_given_frequencies():
    model = small_model()
    prediction = torch.randn(2, 3, 64, 64, requires_grad=True)
    mask = low_and_high((64, 64), 5)
    model.loss(torch.randn(2, 3, 64, 64), prediction, mask).backward()
    spectrum = torch.fft.fftshift(torch.fft.fft2(prediction.grad), dim=(-2, -1)).abs()
    missing = mask.view(2, 1, 64, 64).expand(-1, 3, -1, -1)
    assert spectrum[~missing].max() < 1e-6 * spectrum[missing].max()
    assert spectrum[missing].min() > 1e-3 * spectrum[missing].max()


def test_perfect_prediction():
    prediction = torch.randn(2, 3, 64, 64, requires_grad=True)
    loss = small_model().loss(prediction.detach(), prediction, low_and_high((64, 64), 5))
    loss.backward()
    assert loss <= 1.001e-6 and prediction.grad.abs().max() == 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_works_with_every_backbone(backbone, tmp_path):
    model = small_model(backbone).train()
    inputs = example_inputs(model.config, 2)
    output = model(**inputs, noise=torch.tensor([[0.1], [0.9]]))
    assert output.reconstruction.shape == (2, 3, 64, 64)
    output.loss.backward()
    gradient = sum(p.grad.abs().sum() for p in model.backbone.parameters() if p.grad is not None)
    assert gradient > 0 and gradient.isfinite()
    export_encoder(model.eval(), MaskedImageProcessor(**model.config.processor_settings()), tmp_path)
    plain, ours = AutoModel.from_pretrained(tmp_path).eval(), MFMModel(model.config).eval()
    ours.backbone.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        expected = plain(**inputs).last_hidden_state
        torch.testing.assert_close(ours(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_each_cell_predicts_its_own_pixels():
    for backbone, stride in (("vit", 16), ("swin", 8), ("resnet", 8), ("convnext", 8)):
        model = small_model(backbone)
        assert model.config.encoder_stride == stride
        cells = torch.zeros(1, model.config.hidden_size, 64 // stride, 64 // stride)
        changed = cells.clone()
        changed[:, :, 1, 2] = 1.0
        moved = (model.decoder(changed) - model.decoder(cells)).abs().sum(dim=1)[0] > 0
        expected = torch.zeros(64, 64, dtype=torch.bool)
        expected[stride : 2 * stride, 2 * stride : 3 * stride] = True
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("size", [(64, 64), (48, 32)])
def test_turning_by_half_commutes_with_the_filter(size):
    """Up to the shift by one pixel that keeps pixel (0, 0) in its place."""

    def turned(pictures):
        return pictures.flip(-1, -2).roll((1, 1), dims=(-2, -1))

    pictures, masks = raw_pictures(2, size), low_and_high(size, 5)
    filtered = frequency_filter(pictures, masks)
    torch.testing.assert_close(frequency_filter(turned(pictures), masks), turned(filtered), rtol=0, atol=1e-5)


# The draw, the inputs, the pictures


def test_processor_decides_per_sample_and_model_follows():
    config = MFMConfig(backbone_config=BACKBONES["vit"], mask_radius=5, low_pass_probability=0.3)
    processor = MaskedImageProcessor(**config.processor_settings())
    pixels = torch.randint(256, (2000, 3, 64, 64), dtype=torch.uint8)[:1].expand(2000, -1, -1, -1)
    indices = torch.arange(2000)
    noise = processor.finish_training(pixels, indices, 0, 0)["noise"]
    assert noise.shape == (2000, 1)
    assert torch.equal(processor.finish_training(pixels[7:9], indices[7:9], 0, 0)["noise"], noise[7:9])
    model = MFMForPreTraining(config)
    low_pass = model.draw_mask(torch.zeros(2000, 3, 64, 64).expand(-1, -1, -1, -1), noise)[:, 0]
    assert torch.equal(low_pass, noise[:, 0] < 0.3) and abs(low_pass.float().mean() - 0.3) < 0.04


def test_normalisation_of_the_processor_is_the_models():
    config = MFMConfig(backbone_config=BACKBONES["vit"], image_mean=0.25, image_std=[0.2, 0.3, 0.4])
    processor = MaskedImageProcessor(**config.processor_settings())
    assert processor.image_mean == [0.25] * 3 and processor.image_std == [0.2, 0.3, 0.4]
    pictures = [torch.full((3, 64, 64), level, dtype=torch.uint8) for level in (0, 255)]
    model = MFMForPreTraining(config)
    pixel_values = processor(pictures)["pixel_values"]
    corrupted = model.corrupt(pixel_values, torch.zeros(2, 64 * 64, dtype=torch.bool))
    torch.testing.assert_close(processor.denormalize(corrupted)[:, 0, 0, 0], torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"from -0\.\d\d to 1\.\d\d.*image_mean and image_std"):
        small_model()(2 * torch.rand(1, 3, 64, 64) - 1 + torch.randn(1, 3, 64, 64))
    # One that no mean of ours explains.
    other = MaskedImageProcessor(size=64, mask_kind=None, image_mean=0.5, image_std=0.5)
    with pytest.raises(ValueError, match="image_mean"):
        model(other(pictures)["pixel_values"])


def test_pictures_complete_what_is_given_with_what_is_predicted():
    model = small_model().eval()
    pixel_values = (raw_pictures(4) - MEAN) / STD
    mask = low_and_high((64, 64), 5).repeat(2, 1)
    panels, output = model.pictures(pixel_values, mask), model(pixel_values, mask)
    assert {panel.shape for panel in panels.values()} == {pixel_values.shape}
    shown = panels["reconstruction (given + predicted)"]
    torch.testing.assert_close(frequency_filter(shown, mask), frequency_filter(pixel_values, mask), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        frequency_filter(shown, ~mask), frequency_filter(output.reconstruction, ~mask), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(panels["corrupted"], output.corrupted)
    missing = mask.view(4, 1, 64, 64).expand(-1, 3, -1, -1)
    for name, where in (("given spectrum", missing), ("predicted spectrum", ~missing)):
        drawn = panels[name] * STD + MEAN
        assert drawn[where].abs().max() < 1e-5 and drawn[~where].max() > 0.1, name


def test_initialization_is_the_references():
    model = small_model(
        backbone_config=ViTConfig(image_size=64, hidden_size=256, num_hidden_layers=2, num_attention_heads=4)
    )
    layer = model.backbone.layers[1]
    # Cut at one deviation, a normal's deviation is 0.54 of it.
    for weight, expected in (
        (model.backbone.embeddings.position_embeddings, 0.02),
        (model.backbone.embeddings.patch_embeddings.projection.weight, 0.02),
        (layer.attention.q_proj.weight, 0.02),
        (layer.mlp.fc2.weight, 0.01),  # the second block's: over sqrt(4)
        (layer.attention.o_proj.weight, 0.01),
    ):
        assert weight.abs().max() <= expected + 1e-6
        assert weight.std().item() == pytest.approx(0.54 * expected, rel=0.05)
    assert model.decoder[0].weight.abs().max() > 0.05, "torch's own"
    resnet = small_model("resnet").backbone
    assert all(
        block.layer[-1].normalization.weight.abs().max() == 0 for s in resnet.encoder.stages for block in s.layers
    )


def test_parameter_count_of_the_base_model():
    with torch.device("meta"):
        model = MFMForPreTraining(MFMConfig())
    # ViT-B/16 (85,798,656 with positions and norm) and the head; the reference has no bias of the keys: 9,216 less.
    assert sum(p.numel() for p in model.parameters()) == 85_798_656 + (768 + 1) * 768


def test_other_resolutions():
    for backbone, size in (("vit", (32, 96)), ("resnet", (40, 64))):
        model = small_model(backbone).eval()
        pixel_values = (raw_pictures(2, size) - MEAN) / STD
        output = model(pixel_values)
        assert output.reconstruction.shape == pixel_values.shape and output.loss.isfinite()


def test_starts_from_a_pretrained_vit(tmp_path):
    vit = ViTModel(BACKBONES["vit"])
    vit.save_pretrained(tmp_path)
    model = MFMForPreTraining.from_backbone(str(tmp_path), mask_radius=5)
    assert torch.equal(model.backbone.layers[1].mlp.fc1.weight, vit.layers[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_radius": 33}, ["mask_radius is 33", "64 x 64", "32"]),
        ({"mask_radius": 0}, ["mask_radius is 0", "16 at 224"]),
        ({"mask_radius_outer": 4}, ["mask_radius_outer is 4", "mask_radius=5"]),
        ({"low_pass_probability": 1.5}, ["1.5", "[0, 1]"]),
        ({"loss_gamma": 0.0}, ["loss_gamma is 0", "1"]),
        ({"image_mean": [0.5, 0.5]}, ["image_mean has 2", "num_channels=3"]),
        ({"backbone_config": {"model_type": "vit", "image_size": 64, "patch_size": [16, 8]}}, ["16 x 8", "squares"]),
        ({"backbone_config": SwinConfig(**SWIN | {"window_size": 16}, image_size=64)}, ["window_size=16", "128"]),
        ({"backbone_config": {"model_type": "beit"}}, ["beit", "vit"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        MFMConfig(**{"backbone_config": BACKBONES["vit"], "mask_radius": 5} | settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("pixels", "mask", "words"),
    [
        ((2, 1, 64, 64), None, ["1 channels", "num_channels=1"]),
        ((2, 3, 72, 64), None, ["72 x 64", "16 x 16"]),
        ((2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool), ["(2, 64, 64)", "(2, 4096)"]),
    ],
)
def test_inputs_that_do_not_fit_say_so(pixels, mask, words):
    with pytest.raises(ValueError) as error:
        small_model()(torch.zeros(pixels), bool_masked_pos=mask)
    assert all(word in str(error.value) for word in words), error.value


def test_tiny_example_predicts_missing_frequencies_only():
    """No leak: what stands at the missing frequencies of the target does not reach the prediction."""
    model = MFMForPreTraining(tiny_config()).eval()
    pixels = 0.3 + 0.4 * raw_pictures(2, (32, 32))
    mask = low_and_high((32, 32), 4)
    other = pixels + frequency_filter(0.05 * torch.randn(2, 3, 32, 32), ~mask)
    first, second = (model((p - MEAN) / STD, bool_masked_pos=mask) for p in (pixels, other))
    torch.testing.assert_close(second.reconstruction, first.reconstruction, rtol=1e-4, atol=1e-4)
    assert (second.loss - first.loss).abs() > 1e-3


# The learning experiment


def learners() -> dict[str, MFMConfig]:
    mean, std = PROCESSOR.image_mean, PROCESSOR.image_std
    common = {"mask_radius": 4, "image_mean": mean, "image_std": std}
    vit = ViTConfig(
        **VIT | {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "patch_size": 4},
        image_size=32,
        num_channels=1,
    )
    resnet = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", image_size=32, num_channels=1
    )
    return {
        "vit": MFMConfig(backbone_config=vit, **common),
        "resnet": MFMConfig(backbone_config=resnet, low_pass_probability=0.3, **common),
    }


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_learns_frequencies_and_features(backbone):
    """Fashion-MNIST, 32 pixels, radius 4: better than zeros and than the input itself; the ViT fine-tunes better than
    from scratch. The small ResNet does not after so few steps."""
    (pictures, labels), (unseen, unseen_labels) = fashion(4000, 1000)
    torch.manual_seed(0)
    config = learners()[backbone]
    model = pretrain(MFMForPreTraining(config), pictures, steps=500)
    with torch.no_grad():
        output = model(unseen)
        zeros = model.loss(unseen, torch.zeros_like(unseen), output.mask)
        copied = model.loss(unseen, output.corrupted, output.mask)
    assert output.loss < 0.9 * zeros and output.loss < 0.9 * copied
    if backbone == "resnet":
        return
    few, test = ((PROCESSOR.denormalize(part) * 255).round().to(torch.uint8) for part in (pictures[:200], unseen))
    settings = ImageSettings(mean=tuple(PROCESSOR.image_mean), std=tuple(PROCESSOR.image_std), size=(32, 32))
    pretrained, scratch = (
        finetune(encoder, few, labels[:200], test, unseen_labels, settings=settings, steps=100)["accuracy"]
        for encoder in (model.backbone, config.backbone_config)
    )
    assert pretrained > scratch + 0.01
