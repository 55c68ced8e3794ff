"""SparK against its reference, and every check of its spec (section 11)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, ConvNextConfig, ConvNextV2Config, PreTrainedConfig, ResNetConfig

from hf_masked import MaskedImageProcessor, SparKConfig, SparKForPreTraining, SparKModel
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_image.spark import convert_official_weights, official_config, tiny_config
from hf_masked.modeling.parts.patches import patchify, visible_indices
from hf_masked.modeling.parts.targets import normalize_patches
from hf_masked.modeling.parts.visible_units import VisibleUnits
from hf_masked.modeling.registry import get_variant
from hf_masked.training.export import export_encoder
from tests.modeling.masked_image.short_runs import fashion, pretrain
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "spark.json").read_text())

# Strides 4 and 8, or 2, 4 and 8: units of 8 pixels.
BACKBONES = {
    "resnet_basic": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", image_size=32
    ),
    "resnet_bottleneck": ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], image_size=32),
    "convnext": ConvNextConfig(
        patch_size=2,
        num_stages=3,
        hidden_sizes=[8, 16, 24],
        depths=[1, 1, 2],
        layer_scale_init_value=0.5,
        image_size=32,
    ),
    "convnextv2": ConvNextV2Config(
        patch_size=2, num_stages=3, hidden_sizes=[8, 16, 24], depths=[1, 1, 2], image_size=32
    ),
}


def small_model(backbone: str | PreTrainedConfig = "resnet_basic", model_class=SparKForPreTraining, **settings):
    """With weights of no special value anywhere: identities and zeros would hide mistakes."""
    backbone_config = copy.deepcopy(BACKBONES[backbone]) if isinstance(backbone, str) else backbone
    torch.manual_seed(0)
    model = model_class(SparKConfig(**{"backbone_config": backbone_config, "decoder_hidden_size": 16} | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.abs().max() == 0:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def masks(batch: int = 3, units: int = 16, visible: int = 6) -> torch.Tensor:
    """bool (batch, units), another one in each row."""
    noise = torch.rand(batch, units, generator=torch.Generator().manual_seed(0))
    return noise.argsort(dim=1) >= visible


def at(mask: torch.Tensor, size, grid: tuple[int, int] = (4, 4)) -> torch.Tensor:
    """The mask at the positions of maps of a size: bool (batch, 1, height, width)."""
    units = mask.view(-1, 1, *grid)
    return units.repeat_interleave(size[0] // grid[0], 2).repeat_interleave(size[1] // grid[1], 3)


# The reference, through the stored values


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    reference = stored["config"]
    settings = {
        "hidden_sizes": reference["widths"],
        "depths": reference["depths"],
        "image_size": reference["input_size"],
    }
    if reference["encoder"] == "resnet":
        kind = "bottleneck" if reference["bottleneck"] else "basic"
        backbone_config = ResNetConfig(embedding_size=reference["stem"], layer_type=kind, **settings)
    else:
        backbone_config = ConvNextConfig(**settings)
    config = SparKConfig(backbone_config=backbone_config, decoder_hidden_size=reference["width"])
    assert ("bn" if config.batch_norm_of_densifiers else "ln") == reference["densify_norm"]
    model = SparKForPreTraining(config)
    fresh = {
        name: torch.ones(shape)
        if name.endswith("var")
        else torch.zeros(shape, dtype=torch.int64 if not shape else None)
        for name, shape in stored["buffers"].items()
    }
    model.load_state_dict(convert_official_weights(filled(stored["parameters"]) | fresh, config))
    model = model.double().train()
    size, grid = reference["input_size"], reference["input_size"] // config.encoder_stride
    pixel_values = filled_pixels((stored["batch"], 3, size, size), f"{run}.pixels").double()
    noise = filled_noise(stored["batch"], grid**2, f"{run}.noise")
    visible = noise.argsort(dim=1)[:, : round(grid**2 * (1 - reference["mask_ratio"]))]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)
    assert mask.int().tolist() == stored["mask"]
    return stored, model, pixel_values, mask, model(pixel_values, mask, output_hidden_states=True)


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored, dtype=ours.dtype)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_features_and_reconstruction_are_the_references(run):
    stored, model, pixel_values, mask, output = run_as_reference(run)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    for ours, theirs in zip(output.hidden_states[1:], stored["stages"], strict=True):
        close(ours.sum(dim=(2, 3)), theirs)
    grid, unit = pixel_values.shape[-1] // model.config.encoder_stride, model.config.encoder_stride
    picture = output.logits[0].view(grid, grid, unit, unit, 3).permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
    close(picture[:, ::4, ::4], stored["reconstruction"])
    statistics = {name: value for name, value in model.state_dict().items() if "running" in name}
    renamed = convert_official_weights(stored["statistics"], model.config)
    for name, value in statistics.items():
        assert value.norm().item() == pytest.approx(renamed[name], rel=1e-5), name
    assert model.eval()(pixel_values, mask).loss.item() == pytest.approx(stored["evaluation"], rel=1e-5)


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, _, _, output = run_as_reference(run)
    output.loss.backward()
    norms = convert_official_weights(stored["gradient_norms"], model.config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The biases before batch norm have a gradient of zero but for rounding.
            assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-4, abs=1e-6), name


def official_checkpoint(run: str) -> dict:
    stored = PARITY["pretraining"][run]
    return {name: torch.ones(shape) for name, shape in {**stored["parameters"], **stored["buffers"]}.items()}


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_official_files_convert_strictly(run, tmp_path):
    official, reference = official_checkpoint(run), PARITY["pretraining"][run]["config"]
    config = official_config(official)
    assert config.backbone_config.hidden_sizes == reference["widths"]
    assert config.backbone_config.depths == reference["depths"]
    assert config.decoder_hidden_size == reference["width"]
    # As `save_checkpoint_with_meta_info_and_opt_state` and `save_checkpoint_model_weights_only` leave them.
    whole, encoder = tmp_path / "withdecoder_spark_style.pth", tmp_path / "timm_style.pth"
    torch.save({"args": "{}", "epoch": 1599, "module": official | {"config": {"sbn": True}}, "optimizer": {}}, whole)
    prefix = "sparse_encoder.sp_cnn."
    torch.save({name.removeprefix(prefix): v for name, v in official.items() if name.startswith(prefix)}, encoder)
    model = convert(get_variant("spark"), whole)
    assert type(model) is SparKForPreTraining
    assert all((p == 1).all() for p in model.parameters() if p.requires_grad)
    assert type(convert(get_variant("spark"), encoder)) is SparKModel
    torch.save(official | {"sparse_encoder.sp_cnn.fc.weight": torch.ones(10, 8)}, whole)
    with pytest.raises(ValueError, match=r"left over: fc\.weight"):
        convert(get_variant("spark"), whole)


# The spec's section 11: what is masked stays masked


def test_the_papers_number_of_units_is_visible():
    config = SparKConfig()
    processor = MaskedImageProcessor(**config.processor_settings())
    given = processor([torch.zeros(3, 224, 224, dtype=torch.uint8)] * 4, seed=0)["bool_masked_pos"]
    assert processor.mask_grid == (7, 7) and (~given).sum(dim=1).tolist() == [20] * 4


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_are_zero_under_the_mask_and_nowhere_else_and_the_mask_does_not_erode(backbone):
    """The hidden activation could make zeros of its own, hence the norm over all channels."""
    mask = masks()
    output = small_model(backbone)(torch.randn(3, 3, 32, 32), mask, output_hidden_states=True)
    for maps in output.hidden_states:
        hidden = at(mask, maps.shape[-2:])
        assert torch.equal(maps.norm(dim=1, keepdim=True) == 0, hidden)
        assert (~hidden).float().mean().item() == 6 / 16
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_pixels_under_the_mask_change_nothing(backbone, training):
    """Not one bit, at any stage, of the statistics or of the predictions; only the target sees them."""
    pixel_values, mask = torch.randn(3, 3, 32, 32), masks()
    changed = torch.where(at(mask, (32, 32)), torch.full_like(pixel_values, float("nan")), pixel_values)
    found = []
    for pixels in (pixel_values, changed):
        model = small_model(backbone).train(training)
        found.append((model(pixels, mask, output_hidden_states=True), model))
    (one, model), (other, other_model) = found
    assert all(torch.equal(a, b) for a, b in zip(one.hidden_states, other.hidden_states, strict=True))
    assert torch.equal(one.logits, other.logits) and other.loss.isnan() and one.loss.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other_model.buffers(), strict=True))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_with_everything_visible_it_is_the_stock_model(backbone, training):
    model = small_model(backbone, SparKModel).train(training)
    stock = copy.deepcopy(model.backbone)
    pixel_values = torch.randn(3, 3, 32, 32)
    expected = stock(pixel_values, output_hidden_states=True)
    output = model(pixel_values, torch.zeros(3, 16, dtype=torch.bool), output_hidden_states=True)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, value in stock.state_dict().items():  # running statistics too
        torch.testing.assert_close(model.backbone.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


def dense_stages(backbone: nn.Module, pixel_values: torch.Tensor, mask: torch.Tensor):
    """The paper's rule on a copy of the stock model, the masked way round: whatever looks at several positions or
    normalises is multiplied by the map afterwards, and batch norm's statistics are taken by indexing with it."""
    backbone = copy.deepcopy(backbone)

    def multiply(module, inputs, output):
        if getattr(module, "data_format", "") == "channels_last":
            return output * ~at(mask, output.shape[1:3]).permute(0, 2, 3, 1)
        return output * ~at(mask, output.shape[2:])

    def normalise(module, inputs, output):
        visible = ~at(mask, output.shape[2:])
        rows = inputs[0].permute(0, 2, 3, 1)[visible.squeeze(1)]
        variance, mean = torch.var_mean(rows, dim=0, correction=0)
        values = (inputs[0].permute(0, 2, 3, 1) - mean) / (variance + module.eps).sqrt() * module.weight + module.bias
        return values.permute(0, 3, 1, 2) * visible

    for module in backbone.modules():
        kind = type(module).__name__
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(normalise)
        elif kind in ("Conv2d", "MaxPool2d", "ConvNextLayer", "ConvNextV2Layer") or hasattr(module, "data_format"):
            module.register_forward_hook(multiply)
        elif kind == "ConvNextV2GRN":
            module.register_forward_pre_hook(
                lambda _, inputs: inputs[0] * ~at(mask, inputs[0].shape[1:3]).permute(0, 2, 3, 1)
            )
    return backbone(pixel_values * ~at(mask, (32, 32)), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("backbone", BACKBONES)
def test_dense_reference_with_multiplied_maps_agrees(backbone):
    model, pixel_values, mask = small_model(backbone).train(), torch.randn(3, 3, 32, 32), masks()
    expected = dense_stages(model.backbone, pixel_values, mask)
    found = model(pixel_values, mask, output_hidden_states=True).hidden_states
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_batch_norm_has_the_statistics_of_the_visible_positions():
    model, pixel_values, mask = small_model().train(), torch.randn(3, 3, 32, 32), masks()
    stem = model.backbone.embedder.embedder
    maps = stem.convolution(pixel_values * ~at(mask, (32, 32)))
    rows = maps.permute(0, 2, 3, 1)[~at(mask, maps.shape[2:]).squeeze(1)]
    dense = nn.BatchNorm1d(8)
    dense(rows)
    model(pixel_values, mask)
    assert len(rows) == 3 * 6 * 4 * 4
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(stem.normalization, name), getattr(dense, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone_stays_the_stock_model(backbone):
    """The same classes, names and weights after masked steps, and no hooks."""
    model = small_model(backbone).train()
    stock = AutoModel.from_config(model.config.backbone_config)
    model(torch.randn(3, 3, 32, 32)).loss.backward()
    assert [type(m) for m in model.backbone.modules()] == [type(m) for m in stock.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.backbone.modules())
    assert not any("forward" in vars(m) for m in model.backbone.modules())
    stock.load_state_dict(model.backbone.state_dict())
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = stock.eval()(pixel_values).last_hidden_state
        assert torch.equal(model.eval().backbone(pixel_values).last_hidden_state, expected)


# The parts


def test_positions_go_where_they_came_from():
    """Every position of a map of its own value: taken in the units' order, and back; rectangles, one loop."""
    maps = torch.arange(2 * 8 * 12.0).view(2, 1, 8, 12)
    mask = masks(2, 6, 2)
    units = VisibleUnits(visible_indices(mask), (2, 3))
    taken = units.take(maps)
    expected = [
        [
            maps[sample, 0, 4 * (unit // 3) + row, 4 * (unit % 3) + column].item()
            for unit in range(6)
            if not mask[sample, unit]
            for row in range(4)
            for column in range(4)
        ]
        for sample in range(2)
    ]
    assert taken[:, 0, :, 0].tolist() == expected
    hidden = at(mask, (8, 12), (2, 3))
    assert torch.equal(units.spread(taken), maps.masked_fill(hidden, 0))
    assert torch.equal(units.spread(taken, fill=torch.tensor([-7.0])), maps.masked_fill(hidden, -7))


def test_decoder_has_the_papers_shapes_and_sizes():
    with torch.device("meta"):
        model = SparKForPreTraining(SparKConfig())
        stages = [torch.zeros(1, width, 20 * side**2, 1) for width, side in ((256, 8), (512, 4), (1024, 2), (2048, 1))]
        picture = model.decoder(stages, VisibleUnits(torch.zeros(1, 20, dtype=torch.int64), (7, 7)))
    assert picture.shape == (1, 3, 224, 224)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.decoder.named_children()}
    assert count["blocks"] + count["head"] == 23_183_115 and count["densifiers"] == 6_230_688
    kernels = [densifier.projection.kernel_size for densifier in model.decoder.densifiers]
    assert kernels == [(1, 1), (3, 3), (3, 3), (3, 3)]
    convnext = ConvNextConfig(depths=[3, 3, 27, 3])
    with torch.device("meta"):
        first = SparKForPreTraining(SparKConfig(backbone_config=convnext)).decoder.densifiers[0]
    assert isinstance(first.projection, nn.Identity) and isinstance(first.norm, nn.LayerNorm)


def test_mask_tokens_fill_the_masked_positions_after_the_norm_and_before_the_projection():
    model, mask = small_model(), masks()
    densifier, seen = model.decoder.densifiers[1], []
    densifier.projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.randn(3, 3, 32, 32), mask)
    hidden = at(mask, seen[0].shape[2:]).expand_as(seen[0])
    token = densifier.mask_token.expand_as(seen[0])
    assert torch.equal(seen[0][hidden], token[hidden])
    assert (seen[0] == token)[~hidden].sum() == 0


def test_loss_is_the_papers_written_as_loops():
    model, pixel_values = small_model(), torch.randn(3, 3, 32, 32)
    output = model(pixel_values)
    total, count = 0.0, 0
    for sample, unit in output.mask.nonzero().tolist():
        row, column = divmod(unit, 4)
        target = pixel_values[sample, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten()
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        total += (output.logits[sample, unit] - target).square().mean()
        count += 1
    torch.testing.assert_close(output.loss, total / count, rtol=1e-5, atol=0)


def test_loss_ignores_visible_units():
    output = small_model()(torch.randn(3, 3, 32, 32))
    output.logits.retain_grad()
    output.loss.backward()
    assert output.logits.grad[~output.mask].abs().max() == 0
    assert output.logits.grad[output.mask].abs().min() > 0


def test_predicting_a_units_mean_costs_one():
    output = small_model()(torch.randn(3, 3, 32, 32))
    pixels = patchify(torch.randn(3, 3, 32, 32), (8, 8))
    assert normalize_patches(pixels).square().mean().item() == pytest.approx(1, abs=0.01)
    model = SparKForPreTraining(tiny_config())
    assert 0.9 < model(torch.randn(3, 3, 32, 32), output.mask).loss < 1.1  # at the start


def test_initialization_is_the_references():
    model = SparKForPreTraining(
        SparKConfig(backbone_config=copy.deepcopy(BACKBONES["resnet_basic"]), decoder_hidden_size=64)
    )
    block, densifier = model.decoder.blocks[0], model.decoder.densifiers[0]
    for layer in (block.layers[0], block.layers[3]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and layer.bias is None
    # Kaiming, fan-out as torch counts it for transposed kernels: input channels times the kernel's area.
    assert block.upsampling.weight.std().item() == pytest.approx((2 / (64 * 16)) ** 0.5, rel=0.1)
    assert block.upsampling.bias.abs().max() == model.decoder.head.bias.abs().max() == 0
    assert 0 < densifier.mask_token.abs().max() <= 0.02
    assert all(
        b.layer[-1].normalization.weight.abs().max() == 0 for s in model.backbone.encoder.stages for b in s.layers
    )


@pytest.mark.parametrize("backbone", ["resnet_basic", "convnext"])
def test_parameters_train_unless_they_are_the_poolers(backbone):
    model = small_model(backbone).train()
    model(torch.randn(3, 3, 32, 32)).loss.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"backbone.layernorm.weight", "backbone.layernorm.bias"} if backbone == "convnext" else set())
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen


def test_mask_tokens_do_not_decay():
    names = [name for name, _ in small_model().named_parameters()]
    assert sum(name.rsplit(".", 1)[-1] in SparKForPreTraining.no_weight_decay(None) for name in names) == 2


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("backbone", ["resnet_basic", "convnextv2"])
def test_rectangles_and_other_resolutions(backbone, channels):
    settings = copy.deepcopy(BACKBONES[backbone].to_dict()) | {"image_size": [64, 32], "num_channels": channels}
    model = small_model(type(BACKBONES[backbone])(**settings)).eval()
    for size in ((64, 32), (32, 96)):
        pixel_values = torch.randn(2, channels, *size)
        output = model(pixel_values)
        assert output.logits.shape == (2, size[0] * size[1] // 64, 64 * channels) and output.loss.isfinite()
        assert {panel.shape for panel in model.pictures(pixel_values).values()} == {pixel_values.shape}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pictures_show_predictions_under_the_mask_only(norm_pix_loss):
    model, pixel_values = small_model(norm_pix_loss=norm_pix_loss).eval(), torch.randn(2, 3, 32, 32)
    output, panels = model(pixel_values), model.pictures(pixel_values)
    hidden = at(output.mask, (32, 32)).expand(-1, 3, -1, -1)
    *_, reconstruction = panels.values()
    assert list(panels)[2] == "reconstruction" + (" (true unit statistics)" if norm_pix_loss else "")
    assert panels["masked"][hidden].abs().max() == 0 and torch.equal(panels["masked"][~hidden], pixel_values[~hidden])
    torch.testing.assert_close(reconstruction[~hidden], pixel_values[~hidden])
    assert (reconstruction - pixel_values)[hidden].abs().mean() > 0.1


def test_export_is_the_stock_model_with_its_pooler(tmp_path):
    model = small_model("convnext").eval()
    export_encoder(model, MaskedImageProcessor(**model.config.processor_settings()), tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(pixel_values).pooler_output, model.backbone(pixel_values).pooler_output)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_ratio": 1.0}, ["1.0", "[0, 1)", "0.59"]),
        ({"mask_ratio": 0.95}, ["0.95", "4 x 4", "8 pixels"]),
        ({"decoder_hidden_size": 20}, ["20", "3 blocks", "multiple of 8", "768"]),
        ({"densify_norm": "group_norm"}, ["group_norm", "batch_norm", "layer_norm"]),
        (
            {"backbone_config": {"model_type": "convnext", "patch_size": 3, "image_size": 96}},
            ["3 x 3", "power of two"],
        ),
        ({"backbone_config": {"model_type": "convnext", "patch_size": 1, "image_size": 96}}, ["1 x 1", "2 x 2"]),
        ({"decoder_hidden_size": 32, "backbone_config": {"model_type": "resnet", "image_size": 100}}, ["100 x 100"]),
        ({"backbone_config": {"model_type": "vit"}}, ["vit", "resnet", "convnext"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        SparKConfig(**{"backbone_config": BACKBONES["resnet_basic"], "decoder_hidden_size": 16} | settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("pixels", "mask", "words"),
    [
        ((2, 1, 32, 32), None, ["1 channels", "num_channels=1"]),
        ((2, 3, 36, 32), None, ["36 x 32", "8 x 8"]),
        ((2, 3, 32, 32), torch.zeros(2, 64, dtype=torch.bool), ["(2, 64)", "(2, 16)"]),
        ((2, 3, 32, 32), torch.eye(16, dtype=torch.bool)[:2].cumsum(1).bool(), ["same count"]),
    ],
)
def test_inputs_that_do_not_fit_say_so(pixels, mask, words):
    with pytest.raises(ValueError) as error:
        small_model()(torch.randn(pixels), bool_masked_pos=mask)
    assert all(word in str(error.value) for word in words), error.value


def test_downsampling_in_the_first_stage_counts():
    settings = BACKBONES["resnet_basic"].to_dict() | {"downsample_in_first_stage": True, "image_size": 64}
    model = small_model(ResNetConfig(**settings))
    assert model.config.encoder_stride == 16
    output = model(torch.randn(2, 3, 64, 64), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 16, 4, 4) and output.logits.shape == (2, 16, 768)


@torch.no_grad()
def pooled_knn(model, splits) -> float:
    """kNN accuracy of the encoder's last map, averaged over the picture."""
    features = []
    for pictures, labels in splits:
        maps = [model.backbone(part).last_hidden_state for part in pictures.split(250)]
        features += [torch.cat(maps).mean(dim=(2, 3)), labels]
    return weighted_knn(*features)


@pytest.mark.slow
def test_learns_more_than_the_mean_of_a_unit():
    """Fashion-MNIST at 32 pixels, units of 8, 300 steps: the loss on unseen pictures, and the features.

    Flat units have a target of zero, so predicting the mean costs less than 1 on these pictures. That fine-tuning with
    few labels beats starting from scratch, and sparse encoding beats zeros in a dense one, does not show at this size.
    """
    splits = fashion(4000, 1000)
    (pictures, _), (unseen, _) = splits
    backbone_config = ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", image_size=32
    )
    torch.manual_seed(0)
    model = SparKForPreTraining(SparKConfig(backbone_config=backbone_config, decoder_hidden_size=32)).eval()
    untrained = pooled_knn(model, splits)
    pretrain(model, pictures, steps=300)
    with torch.no_grad():
        output = model(unseen)
        target = normalize_patches(patchify(unseen, (8, 8)))[output.mask]
    assert output.loss < 0.7 * target.square().mean() < 0.7
    assert pooled_knn(model, splits) > untrained + 0.015
