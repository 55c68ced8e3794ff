"""LocalMIM with Swin against its reference, and every check of its spec (section 11) that concerns Swin."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining, SwinConfig, SwinModel

from hf_masked import (
    LocalMIMConfig,
    LocalMIMForImageClassification,
    LocalMIMForPreTraining,
    LocalMIMModel,
    MaskedImageProcessor,
)
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_image.localmim import convert_official_weights, mask_of_cells, official_config
from hf_masked.modeling.parts import visible_swin
from hf_masked.modeling.parts.relative_positions import TABLE
from hf_masked.modeling.parts.visible_swin import VisibleWindows
from hf_masked.modeling.registry import get_variant
from hf_masked.training.export import export_encoder
from hf_masked.training.recipes import read_recipe
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "localmim_swin.json").read_text())
ROOT = Path(__file__).parents[3]


def small_backbone(**settings) -> SwinConfig:
    """Units of 16 pixels, 4 x 4 of them: 32 x 32 to 4 x 4 tokens in windows of 4."""
    form = {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
    return SwinConfig(**form | {"window_size": 4, "drop_path_rate": 0.0, "layer_norm_eps": 1e-6} | settings)


SMALL_DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}


def small_config(**settings) -> LocalMIMConfig:
    return LocalMIMConfig(**{"backbone_config": small_backbone(), **SMALL_DECODER} | settings)


def small_model(seed: int = 0, **settings) -> LocalMIMForPreTraining:
    torch.manual_seed(seed)
    return LocalMIMForPreTraining(small_config(**settings))


def pixel_mask(mask: torch.Tensor) -> torch.Tensor:
    """bool (batch, 1, 64, 64) of the pixels under masked units of 16."""
    return mask.view(-1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)


# The reference, through the stored values


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    reference = stored["config"]
    backbone_config = small_backbone(
        image_size=reference["img_size"],
        **{name: reference[name] for name in ("patch_size", "embed_dim", "depths", "num_heads", "window_size")},
    )
    target = {"target": "pixel"}
    if reference["target"] == "HOG":
        target = {"hog_bins": reference["hog_nbins"], "hog_random_bias": reference["hog_bias"]}
    config = LocalMIMConfig(
        backbone_config=backbone_config,
        mask_ratio=reference["mask_ratio"],
        decoder_hidden_size=reference["decoder_embed_dim"],
        decoder_num_attention_heads=reference["decoder_num_heads"],
        decoder_intermediate_size=reference["decoder_embed_dim"] * reference["mlp_ratio"],
        **target,
    )
    model = LocalMIMForPreTraining(config).eval()
    # transformers' Swin has 1e-5 in these two kinds of norms, whatever its config says; the reference 1e-6 in all.
    for stage in model.backbone.encoder.layers:
        if stage.downsample is not None:
            stage.downsample.norm.eps = 1e-6
    model.backbone.embeddings.norm.eps = 1e-6
    official = filled(stored["parameters"]) | {
        name: torch.zeros(shape)
        for name, shape in (stored["fixed"] | stored["buffers"]).items()
        if not name.endswith("pos_embed")
    }
    report = model.load_state_dict(convert_official_weights(official, config), strict=False)
    # Only the fixed tables, which are ours to make, may be missing.
    assert all(name.endswith("position_embeddings") for name in report.missing_keys) and not report.unexpected_keys
    size = reference["img_size"]
    pixel_values = filled_pixels((stored["batch"], 3, size, size), f"{run}.pixels")
    # The reference masks the whole batch alike.
    noise = filled_noise(1, (size // 32) ** 2, f"{run}.noise").expand(stored["batch"], -1)
    return stored, model, pixel_values, noise


class MisplacedWindows(VisibleWindows):
    """As published, the reference's second and third stage take the tokens, which stand unit by unit, for tokens in
    raster order: windows and relative positions are those of other places."""

    def __init__(self, positions, grid, window_size, shift):
        side = grid[0] // 7
        if side < 8:
            row, column = positions // grid[1], positions % grid[1]
            unit = row // side * 7 + column // side
            positions = unit * side**2 + row % side * side + column % side
        super().__init__(positions, grid, window_size, shift)


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_losses_outputs_and_gradients_are_the_references(run, monkeypatch):
    stored, model, pixel_values, noise = run_as_reference(run)
    if not stored["corrected"]:
        monkeypatch.setattr(visible_swin, "VisibleWindows", MisplacedWindows)
    output = model(pixel_values, noise=noise)
    assert output.mask.int().tolist() == [stored["mask"]] * stored["batch"]
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    assert [part.item() for part in output.losses.values()] == pytest.approx(stored["losses"], rel=1e-5)
    for ours, theirs, step in zip(output.logits, stored["pred"], stored["cells"], strict=True):
        close(ours[0, ::step, :: stored["values"]], theirs)
    close(output.last_hidden_state, stored["last"])
    grid = (7, 7)
    taps = model.encode_taps(pixel_values, model._visible(output.mask, grid), grid)
    for (tokens, positions, (rows, columns)), theirs, side in zip(taps, stored["latent"], (28, 14, 7, 7), strict=True):
        assert (rows, columns) == (side, side) and positions.shape[1] == 12 * (side // 7) ** 2
        close(tokens.double().sum(dim=1).float(), theirs)

    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        probe = {name: torch.zeros(stored["parameters"][name])}
        ours = [gradients.pop(converted) for converted in convert_official_weights(probe, model.config)]
        assert torch.stack([g.norm() for g in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    assert not gradients, "every parameter of ours is one of the reference's"


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_official_file_converts_strictly(run, tmp_path):
    stored = PARITY["pretraining"][run]
    shapes = stored["parameters"] | stored["fixed"] | stored["buffers"]
    official = {name: torch.zeros(shape) for name, shape in shapes.items()}
    official["encoder.patch_embed.proj.weight"] += 1
    torch.save({"model": official, "epoch": 399}, tmp_path / "pretrain.pth")
    model = convert(get_variant("localmim"), tmp_path / "pretrain.pth")
    backbone, reference = model.config.backbone_config, stored["config"]
    for name in ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"):
        assert getattr(backbone, name) == reference[name], name
    assert backbone.image_size == 224 and backbone.layer_norm_eps == 1e-6
    assert model.config.decoder_num_attention_heads == 4 and model.config.decoder_hidden_size == 16
    assert model.config.target.lower() == reference["target"].lower()
    if reference["target"] == "HOG":
        assert model.config.hog_bins == reference["hog_nbins"] and model.config.hog_random_bias
    assert model.backbone.embeddings.patch_embeddings.projection.weight.min() == 1
    torch.save({"model": official | {"encoder.norm.4.weight": torch.zeros(64)}}, tmp_path / "pretrain.pth")
    with pytest.raises(ValueError, match="left over"):
        convert(get_variant("localmim"), tmp_path / "pretrain.pth")


def test_windows_that_transformers_swin_cannot_have_are_refused():
    """The reference's Swin-L has windows of 14, but of 7 in its last stage."""
    stored = PARITY["pretraining"]["pixel"]
    shapes = stored["parameters"] | stored["fixed"]
    for stage in range(3):
        for block in range(2):
            name = f"encoder.layers.{stage}.blocks.{block}.attn.{TABLE}"
            shapes |= {name: (27 * 27, shapes[name][1])}
    with pytest.raises(ValueError, match="window_size=14"):
        official_config({name: torch.zeros(shape) for name, shape in shapes.items()})


def test_patch_merging_of_the_reference_is_told_by_its_order():
    """The upper right token of four is the second of the reference's, the third of Swin's."""
    name = "encoder.layers.0.downsample.reduction.weight"
    weight = torch.arange(8.0).repeat(4, 1)  # of tokens that are 2 wide
    (converted,) = convert_official_weights({name: weight}, small_config()).values()
    assert converted[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


# The spec's section 11


def test_grids_channels_and_counts_at_the_papers_size():
    settings = read_recipe(ROOT / "recipes" / "localmim_swin_base.yaml")["model"]
    with torch.device("meta"):
        model = LocalMIMForPreTraining(LocalMIMConfig(**settings))
    tables = sum(decoder.position_embeddings.numel() for decoder in model.decoders)
    kernels = 4 * 2 * 9 + model.hog_bias.numel()  # of the reference's HOG layers, frozen parameters there
    assert sum(p.numel() for p in model.decoders.parameters()) + tables == 1_102_872
    assert sum(p.numel() for p in model.parameters()) + tables + kernels == 87_849_760

    backbone_config = small_backbone(image_size=224, patch_size=4, window_size=7)
    shallow = small_model(backbone_config=backbone_config, hog_bins=18)
    assert shallow.config.mask_unit == (32, 32) and shallow.config.scales == [4, 2, 1, 1]
    output = shallow(torch.randn(1, 3, 224, 224))
    assert [tuple(logits.shape) for logits in output.logits] == [(1, side * side, 54) for side in (28, 14, 7, 7)]
    assert output.mask.shape == (1, 49) and output.mask.sum() == 37
    sums = [mask_of_cells(output.mask, (7, 7), scale).sum().item() for scale in shallow.config.scales]
    assert sums == [37 * 16, 37 * 4, 37, 37]


@pytest.mark.parametrize("target", ["hog", "pixel"])
def test_targets_have_the_cells_of_the_stages(target):
    model = small_model(target=target)
    values = {"hog": (27, 27, 27, 27), "pixel": (4 * 4 * 3, 8 * 8 * 3, 16 * 16 * 3, 16 * 16 * 3)}[target]
    shapes = [tuple(values.shape) for values in model.targets(torch.randn(2, 3, 64, 64))]
    assert shapes == [(2, (64 // size) ** 2, width) for size, width in zip((4, 8, 16, 16), values, strict=True)]


def test_encoder_does_not_see_masked_pixels():
    model = small_model().eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    output = model(pixel_values)
    changed = torch.where(pixel_mask(output.mask), torch.randn_like(pixel_values), pixel_values)
    other = model(changed, bool_masked_pos=output.mask)
    assert all(torch.equal(a, b) for a, b in zip(other.logits, output.logits, strict=True))
    assert not torch.equal(other.loss, output.loss)
    moved = model(torch.where(pixel_mask(output.mask), pixel_values, changed + 1), bool_masked_pos=output.mask)
    assert not any(torch.equal(a, b) for a, b in zip(moved.logits, output.logits, strict=True))


def test_one_mask_for_the_batch_and_one_per_sample():
    """The reference's batches share a mask; what a sample gives does not depend on the masks of others."""
    model = small_model().eval()
    pixel_values = torch.randn(3, 3, 64, 64)
    own = model(pixel_values)
    assert own.mask.unique(dim=0).shape[0] > 1
    shared = model(pixel_values, bool_masked_pos=own.mask[:1].expand(3, -1))
    assert torch.equal(shared.mask, own.mask[:1].expand(3, -1))
    for ours, theirs in zip(own.logits, shared.logits, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(ours[1:], theirs[1:], atol=1e-2)


def test_stages_above_a_tap_get_nothing_from_it():
    model = small_model()
    pixel_values = torch.randn(2, 3, 64, 64)
    output = model(pixel_values)
    assert list(output.losses) == ["layer_0", "layer_1", "layer_2", "layer_3"]
    model.tap_losses(pixel_values, output.logits, output.mask, (4, 4))["layer_1"].backward()
    below = ("backbone.embeddings.", "backbone.encoder.layers.0.", "backbone.encoder.layers.1.", "tap_norms.1.")
    for name, parameter in model.named_parameters():
        expected = name.startswith((*below, "decoders.1."))
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == expected, name


def test_every_parameter_learns_and_nothing_but_the_last_norm_is_shared():
    model = small_model()
    model(torch.randn(2, 3, 64, 64)).loss.backward()
    assert all(p.requires_grad and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    assert [norm.normalized_shape for norm in model.tap_norms] == [(16,), (32,), (64,)]
    assert [decoder.embedding.weight.shape for decoder in model.decoders] == [(8, 16), (16, 32), (16, 64), (16, 64)]


def test_some_stages_alone():
    model = small_model(tap_indices=(1, -1))
    assert model.config.taps == [1, 3] and model.config.scales == [2, 1]
    assert [decoder.embedding.weight.shape for decoder in model.decoders] == [(16, 32), (16, 64)]
    output = model(torch.randn(2, 3, 64, 64))
    output.loss.backward()
    assert list(output.losses) == ["layer_1", "layer_3"] and [v.shape[1] for v in output.logits] == [64, 16]


def test_initialisation_is_the_references():
    model = small_model(backbone_config=small_backbone(embed_dim=32))
    layer = model.backbone.encoder.layers[0].blocks[0]
    # Xavier of the matrix of queries, keys and values: (3 * 32, 32).
    bounds = {layer.attention.q_proj: (6 / 128) ** 0.5, layer.mlp.fc1: (6 / 160) ** 0.5}
    bounds[model.backbone.encoder.layers[0].downsample.reduction] = (6 / 192) ** 0.5
    bounds[model.backbone.embeddings.patch_embeddings.projection] = (6 / (32 + 12)) ** 0.5
    bounds[model.decoders[3].head] = (6 / (16 + 27)) ** 0.5
    for module, bound in bounds.items():
        assert 0.9 * bound < module.weight.abs().max() <= bound, module
    assert 0.01 < layer.attention.relative_position_bias.relative_position_bias_table.std() < 0.03
    assert layer.mlp.fc1.bias.abs().max() == 0


# transformers


def test_export_is_a_plain_swin_with_the_same_features(tmp_path):
    model = small_model().eval()
    torch.nn.init.normal_(model.backbone.layernorm.weight)
    export_encoder(model, MaskedImageProcessor(**model.config.processor_settings()), tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert type(plain) is SwinModel
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = plain(pixel_values).last_hidden_state
    everything = torch.zeros(2, 16, dtype=torch.bool)
    torch.testing.assert_close(
        model(pixel_values, bool_masked_pos=everything, return_loss=False).last_hidden_state,
        expected,
        rtol=1e-5,
        atol=1e-5,
    )
    encoder = LocalMIMModel(model.config).eval()
    encoder.backbone.load_state_dict(model.backbone.state_dict())
    output = encoder(pixel_values, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected) and len(output.hidden_states) == 5
    masked = encoder(pixel_values, bool_masked_pos=torch.arange(16).expand(2, -1) >= 4).last_hidden_state
    assert masked.shape == (2, 4, 64)


def test_starts_from_transformers_swin():
    plain = SwinModel(small_backbone(), add_pooling_layer=True, use_mask_token=True)
    model = LocalMIMForPreTraining.from_backbone(plain, **SMALL_DECODER)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_weights_and_tables_come_back_through_the_auto_classes(tmp_path):
    model = small_model(hog_random_bias=True).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(loaded) is LocalMIMForPreTraining and loaded.config.backbone_config.depths == [2, 2, 2, 2]
    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    assert torch.equal(loaded(pixel_values, noise=noise).loss, model(pixel_values, noise=noise).loss)
    encoder, report = LocalMIMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert torch.equal(encoder(pixel_values).last_hidden_state, model.backbone(pixel_values).last_hidden_state)


def test_classifier_is_the_references_head_on_plain_features(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    classifier, report = LocalMIMForImageClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    pixel_values = torch.randn(2, 3, 64, 64)
    plain = model.backbone.eval()
    plain.layernorm = torch.nn.Identity()
    pooled = plain(pixel_values).last_hidden_state.mean(dim=1)
    # The norm comes after pooling, and starts anew.
    expected = classifier.classifier(torch.nn.functional.layer_norm(pooled, (64,), eps=1e-6))
    output = classifier(pixel_values, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(output.logits, expected)
    output.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in classifier.parameters())


@pytest.mark.parametrize("mode", ["half", "checkpointing", "compile"])
def test_in_the_ways_the_conformance_suite_tries_vits(mode):
    backbone_config = small_backbone(patch_size=4, depths=[2, 1], num_heads=[1, 2])
    # Pixels: the suite compiles HOG with ViTs.
    model, reference = (small_model(backbone_config=backbone_config, target="pixel").train() for _ in range(2))
    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 64)
    expected = reference(pixel_values, noise=noise)
    expected.loss.backward()
    if mode == "half":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(pixel_values, noise=noise).loss
        loss.backward()
        torch.testing.assert_close(loss, expected.loss, rtol=0.05, atol=0)
        return
    if mode == "checkpointing":
        model.gradient_checkpointing_enable()
        called = []
        layer = model.backbone.encoder.layers[0].blocks[1]
        layer.layernorm_before.register_forward_hook(lambda *_: called.append(1))
        run = model
    else:
        run = torch.compile(model, backend="eager", fullgraph=True)
    run(pixel_values, noise=noise).loss.backward()
    assert mode != "checkpointing" or len(called) == 2, "the layer is run again for the gradient"
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_stages_are_no_units_of_sharding_and_tables_do_not_decay():
    model = small_model()
    assert "SwinStage" not in model._no_split_modules and "TransformerBlock" in model._no_split_modules
    assert model.no_weight_decay() == {TABLE, "mask_token"}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("target", ["hog", "pixel"])
def test_rectangles_channels_and_other_sizes(target):
    backbone_config = small_backbone(image_size=[64, 128], num_channels=4)
    model = small_model(backbone_config=backbone_config, target=target).eval()
    for size in ((64, 128), (96, 64)):
        pixel_values = torch.randn(2, 4, *size)
        output = model(pixel_values)
        assert output.loss.isfinite() and output.logits[0].shape[1] == size[0] * size[1] // 16
        panels = model.pictures(pixel_values)
        assert {panel.shape for panel in panels.values()} == {pixel_values.shape}
        hidden = (panels["masked"] == 0).all(dim=1, keepdim=True).expand_as(pixel_values)
        assert hidden.float().mean() == pytest.approx(0.75, abs=0.02)
        for stage, cell in ((0, 4), (1, 8), (3, 16)):
            drawn, truth = (panels[f"{name} (cells of {cell} x {cell})"] for name in (f"layer {stage}", "true"))
            torch.testing.assert_close(drawn[~hidden], truth[~hidden])
            assert not torch.allclose(drawn[hidden], truth[hidden], atol=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tap_scales": (4, 2, 1, 1)}, ["tap_scales", "Swin", "leave it out"]),
        ({"tap_indices": (0, 1)}, ["[0, 1]", "last is 3"]),
        ({"backbone_config": small_backbone(window_size=8)}, ["4 x 4", "window_size=8", "128"]),
        ({"backbone_config": small_backbone(image_size=72)}, ["72 x 72", "16 x 16"]),
        ({"backbone_config": small_backbone(image_size=16, window_size=1)}, ["all of the 1 x 1 units", "16"]),
        ({"decoder_hidden_size": 18}, ["18", "multiple of 4"]),
        ({"classifier_pooling": "cls"}, ["cls", "mean"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        small_config(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_inputs_that_do_not_fit_say_so():
    model = small_model()
    with pytest.raises(ValueError, match=r"64 x 72.*16 x 16"):
        model(torch.randn(1, 3, 64, 72))
    with pytest.raises(ValueError, match=r"4 x 2.*window_size=4"):
        model(torch.randn(1, 3, 64, 32))
    with pytest.raises(ValueError, match=r"\(1, 16\)"):
        model(torch.randn(1, 3, 64, 64), bool_masked_pos=torch.zeros(1, 1024, dtype=torch.bool))
    with pytest.raises(ValueError, match="masks everything"):
        model(torch.randn(1, 3, 64, 64), bool_masked_pos=torch.ones(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="LocalMIMModel, without a mask"):
        model(torch.randn(1, 3, 64, 64), output_hidden_states=True)
