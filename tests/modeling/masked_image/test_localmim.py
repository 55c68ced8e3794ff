"""LocalMIM with ViTs against its reference, MAE, and every check of its spec (section 11) that concerns ViTs."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, ViTConfig, ViTModel

from hf_masked import (
    LocalMIMConfig,
    LocalMIMForImageClassification,
    LocalMIMForPreTraining,
    LocalMIMModel,
    MAEConfig,
    MAEForPreTraining,
    MaskedImageProcessor,
)
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_image.localmim import (
    convert_official_weights,
    mask_of_cells,
    official_config,
    tiny_config,
)
from hf_masked.modeling.parts.hog import hog
from hf_masked.modeling.registry import get_variant
from hf_masked.training.export import export_encoder
from tests.modeling.masked_image.short_runs import fashion, knn, pretrain
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "localmim.json").read_text())


def small_backbone(**settings) -> ViTConfig:
    return ViTConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "layer_norm_eps": 1e-6,
            "image_size": 32,
            "patch_size": 8,
        }
        | settings
    )


SMALL_DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}


def small_model(seed: int = 0, **settings) -> LocalMIMForPreTraining:
    torch.manual_seed(seed)
    return LocalMIMForPreTraining(LocalMIMConfig(**{"backbone_config": small_backbone(), **SMALL_DECODER} | settings))


def pixel_mask(mask: torch.Tensor) -> torch.Tensor:
    """bool (batch, 1, 32, 32) of the pixels under masked patches of 8."""
    return mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


# The reference, through the stored values


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    reference = stored["config"]
    width, size = reference["embed_dim"], reference["img_size"]
    backbone_config = small_backbone(
        hidden_size=width,
        num_hidden_layers=reference["depth"],
        num_attention_heads=reference["num_heads"],
        intermediate_size=width * reference["mlp_ratio"],
        image_size=size,
        patch_size=reference["patch_size"],
    )
    config = LocalMIMConfig(
        backbone_config=backbone_config,
        mask_ratio=reference["mask_ratio"],
        tap_indices=(1, 3, -3, -1),
        decoder_hidden_size=reference["decoder_embed_dim"],
        decoder_num_attention_heads=reference["decoder_num_heads"],
        decoder_intermediate_size=reference["decoder_embed_dim"] * reference["mlp_ratio"],
        hog_bins=reference["hog_nbins"],
        hog_random_bias=reference["hog_bias"],
    )
    model = LocalMIMForPreTraining(config).eval()
    official = filled(stored["parameters"])
    kernels = {name: torch.zeros(shape) for name, shape in stored["fixed"].items() if name.startswith("hog_enc.")}
    report = model.load_state_dict(convert_official_weights(official | kernels, config), strict=False)
    # Only the fixed tables, which are ours to make, may be missing.
    assert all(name.endswith("position_embeddings") for name in report.missing_keys) and not report.unexpected_keys
    pixel_values = filled_pixels((stored["batch"], 3, size, size), f"{run}.pixels")
    noise = filled_noise(stored["batch"], (size // reference["patch_size"]) ** 2, f"{run}.noise")
    return stored, model, pixel_values, model(pixel_values, noise=noise)


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_losses_and_outputs_are_the_references(run):
    stored, model, pixel_values, output = run_as_reference(run)
    assert output.mask.int().tolist() == stored["mask"]
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    assert [part.item() for part in output.losses.values()] == pytest.approx(stored["losses"], rel=1e-5)
    for ours, theirs in zip(output.logits, stored["pred"], strict=True):
        close(ours[:1], theirs)
    for ours, theirs in zip(model.targets(pixel_values)[1:], stored["hog"], strict=True):
        close(ours[:1], theirs)
    # The reference keeps its tokens in the order of the noise, ours are in raster order.
    order = torch.tensor(stored["ids_keep"]).argsort(dim=1)
    latent = torch.tensor(stored["latent"])
    tokens = latent[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, latent.shape[-1]))
    close(output.last_hidden_state, torch.cat([latent[:, :1], tokens], dim=1).tolist())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, _, output = run_as_reference(run)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        probe = {name: torch.zeros(stored["parameters"][name])}
        ours = [gradients.pop(converted) for converted in convert_official_weights(probe, model.config)]
        assert torch.stack([g.norm() for g in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    assert not gradients, "every parameter of ours is one of the reference's"


def official_checkpoint(run: str) -> dict[str, torch.Tensor]:
    """The stored run's checkpoint as `torch.load` would give it, its encoder as wide as the reference's ViT-S."""
    stored = PARITY["pretraining"][run]
    narrow = stored["config"]["embed_dim"]
    decoder = stored["config"]["decoder_embed_dim"]
    official = {}
    for name, shape in (stored["parameters"] | stored["fixed"]).items():
        outer = not name.startswith(("decoder.", "hog_enc."))
        if outer:
            shape = [side * 384 // narrow if side % narrow == 0 else side for side in shape]
        elif name.endswith("embed.weight"):
            shape = [decoder, 384]
        official[name] = torch.zeros(shape)
    return official | {"patch_embed.proj.weight": torch.ones(384, 3, 16, 16)}


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_official_file_converts_strictly(run, tmp_path):
    official = official_checkpoint(run)
    reference = PARITY["pretraining"][run]["config"]
    config = official_config(official)
    # Their depth is the reference's B or L; the taps of these small ones are the reference's rule.
    config.tap_indices = [1, 3, -3, -1]
    torch.save({"model": official, "epoch": 1599}, tmp_path / "pretrain.pth")
    config.decoder_num_attention_heads = reference["decoder_num_heads"]
    model = convert(get_variant("localmim"), tmp_path / "pretrain.pth", config)
    assert model.config.backbone_config.num_attention_heads == 6
    assert model.config.hog_bins == reference["hog_nbins"] and model.config.hog_random_bias == reference["hog_bias"]
    assert model.backbone.embeddings.patch_embeddings.projection.weight.min() == 1
    torch.save({"model": official | {"norm.4.weight": torch.zeros(384)}}, tmp_path / "pretrain.pth")
    with pytest.raises(ValueError, match="left over"):
        convert(get_variant("localmim"), tmp_path / "pretrain.pth", config)


def test_other_files_and_unknown_widths_are_refused():
    with pytest.raises(ValueError, match="neither of a ViT nor of a Swin"):
        official_config({"layers.0.blocks.0.attn.qkv.weight": torch.zeros(1)})
    shapes = {"patch_embed.proj.weight": (96, 3, 16, 16), "blocks.0.attn.qkv.weight": (288, 96)}
    known = {name: torch.zeros(shape) for name, shape in (shapes | {"decoder.3.pred.1.weight": (27, 256)}).items()}
    with pytest.raises(ValueError, match=r"96 wide.*384, 768, 1024"):
        official_config(known)


# The spec's section 11


def test_grids_channels_and_counts_at_the_papers_size():
    with torch.device("meta"):
        model = LocalMIMForPreTraining(LocalMIMConfig())
    assert model.config.taps == [1, 3, 9, 11]
    tables = sum(decoder.transformer.position_embeddings.numel() for decoder in model.decoders)
    decoders = sum(p.numel() for p in model.decoders.parameters())
    assert decoders == 4_264_172
    kernels = 4 * 2 * 9  # of the reference's HOG layers, frozen parameters there
    assert sum(p.numel() for p in model.parameters()) + tables + kernels == 90_269_236
    shallow = small_model(backbone_config=small_backbone(image_size=224, patch_size=16))
    output = shallow(torch.randn(1, 3, 224, 224))
    assert [tuple(logits.shape) for logits in output.logits] == [(1, side * side, 27) for side in (56, 28, 14, 7)]
    sums = [mask_of_cells(output.mask, (14, 14), scale).sum().item() for scale in (4, 2, 1, 0.5)]
    assert sums == [147 * 16, 147 * 4, 147, 147 / 4]


def test_with_the_top_layer_and_pixels_alone_it_is_mae():
    local = small_model(tap_indices=(-1,), tap_scales=(1,), target="pixel").eval()
    mae = MAEForPreTraining(
        MAEConfig(backbone_config=small_backbone(), decoder_num_hidden_layers=1, **SMALL_DECODER)
    ).eval()
    weights = local.state_dict()
    renamed = {}
    for name, value in weights.items():
        name = name.replace("decoders.0.transformer.", "decoder.").replace("decoders.0.head.0.", "decoder.head.")
        renamed[name] = value.flatten(1) if name == "decoder.head.weight" else value
    mae.load_state_dict(renamed)
    pixel_values, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    ours, theirs = local(pixel_values, noise=noise), mae(pixel_values, noise=noise)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.logits[0], theirs.logits, rtol=1e-5, atol=1e-6)


def test_layers_above_a_tap_get_nothing_from_it():
    model = small_model(tap_indices=(1, 3), tap_scales=(4, 1))
    output = model(torch.randn(2, 3, 32, 32))
    model.tap_losses(torch.randn(2, 3, 32, 32), output.logits, output.mask, (4, 4))["layer_1"].backward()
    for name, parameter in model.named_parameters():
        below = name.startswith(("backbone.embeddings.", "backbone.layers.0.", "backbone.layers.1.", "tap_norms.0."))
        expected = parameter.requires_grad and (below or name.startswith("decoders.0."))
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == expected, name


def test_upper_taps_reach_lower_layers_past_their_norms():
    """The stream between layers is not normalised, and nothing stops gradients between taps."""
    model = small_model(tap_indices=(1, 3), tap_scales=(4, 1))
    torch.nn.init.zeros_(model.tap_norms[0].weight)
    output = model(torch.randn(2, 3, 32, 32))
    output.logits[1].square().sum().backward()
    assert model.backbone.layers[0].mlp.fc1.weight.grad.abs().max() > 0
    assert model.tap_norms[0].weight.grad is None


def test_targets_are_maskfeats_hog_one_cell_each():
    model = small_model(backbone_config=small_backbone(image_size=64, patch_size=16))
    picture = torch.randn(2, 3, 64, 64)
    for size, target in zip((4, 8, 16, 32), model.targets(picture), strict=True):
        expected = hog(picture, (size, size)).flatten(1, 2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-6)
        assert target.shape == (2, (64 // size) ** 2, 27)


def test_contrast_does_not_matter_and_flat_pictures_give_zeros():
    model = small_model()
    picture = torch.randint(256, (1, 3, 32, 32)) / 256
    for target, scaled in zip(model.targets(picture), model.targets(4 * picture), strict=True):
        torch.testing.assert_close(target, scaled, rtol=0, atol=1e-6)
    assert all(target.abs().max() == 0 for target in model.targets(torch.full((1, 3, 32, 32), 0.7)))


@pytest.mark.parametrize("target", ["hog", "pixel"])
def test_loss_is_the_papers_written_as_loops(target):
    model = small_model(target=target)
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    targets = model.targets(pixel_values)
    mask = output.mask.view(2, 4, 4)
    expected = 0.0
    for scale, logits, truth in zip((4, 2, 1, 0.5), output.logits, targets, strict=True):
        side = int(4 * scale)
        total = weights = 0.0
        for sample in range(2):
            for row in range(side):
                for column in range(side):
                    if scale < 1:
                        weight = mask[sample, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].float().mean()
                    else:
                        weight = mask[sample, row // int(scale), column // int(scale)].float()
                    cell = row * side + column
                    total += weight * (logits[sample, cell] - truth[sample, cell]).square().mean()
                    weights += weight
        expected += total / weights
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(output.losses.values()), output.loss)
    assert list(output.losses) == ["layer_0", "layer_1", "layer_2", "layer_3"]


def test_pixel_targets_are_normalised_cell_by_cell():
    model = small_model(target="pixel")
    for size, target in zip((2, 4, 8, 16), model.targets(torch.randn(2, 3, 32, 32)), strict=True):
        assert target.shape == (2, (32 // size) ** 2, size * size * 3)
        assert target.mean(dim=-1).abs().max() < 1e-5 and (target.var(dim=-1) - 1).abs().max() < 1e-3


def test_encoder_does_not_see_masked_pixels():
    model = small_model().eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    changed = torch.where(pixel_mask(output.mask), torch.randn_like(pixel_values), pixel_values)
    other = model(changed, bool_masked_pos=output.mask)
    assert all(torch.equal(a, b) for a, b in zip(other.logits, output.logits, strict=True))
    assert not torch.equal(other.loss, output.loss)


def test_order_of_cells_is_raster_at_every_scale():
    """A head of each scale, fed a map that is marked in one place, answers in the cells of that place."""
    model = small_model()
    for scale, decoder in zip((4, 2, 1, 0.5), model.decoders, strict=True):
        feature_map = torch.zeros(1, 16, 4, 4)
        marked = feature_map.clone()
        marked[..., 1, 2] = torch.randn(16)
        change = (decoder.head(marked) - decoder.head(feature_map)).abs().sum(dim=1)[0] > 0
        expected = torch.zeros(4, 4)
        expected[1, 2] = 1
        expected = mask_of_cells(expected.flatten()[None], (4, 4), scale)[0] > 0
        assert torch.equal(change.flatten(), expected)


def test_random_bias_is_saved_and_changes_the_target(tmp_path):
    model = small_model(hog_random_bias=True)
    assert model.hog_bias.shape == (4, 2) and 0 < model.hog_bias.abs().max() <= 1 / 3
    model.save_pretrained(tmp_path)
    loaded = LocalMIMForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(loaded.hog_bias, model.hog_bias)
    flat = torch.zeros(1, 3, 32, 32)
    assert all(target.abs().max() > 0 for target in loaded.targets(flat))
    assert LocalMIMModel.from_pretrained(tmp_path).backbone is not None


def test_initialization_is_the_references():
    model = small_model(decoder_hidden_size=64)
    head = model.decoders[0].head
    for layer, inputs in ((head[0], 32 * 4), (head[3], 16 * 4), (head[4], 16)):
        # torch's own: uniform within 1 / sqrt(fan-in), which of a transposed convolution torch counts by its outputs.
        bound = 1 / math.sqrt(inputs)
        assert 0.9 * bound < layer.weight.abs().max() <= bound and 0 < layer.bias.abs().max() <= bound
    assert (head[1].weight == 1).all() and (head[1].bias == 0).all()
    assert 0.01 < model.decoders[0].transformer.mask_token.std() < 0.03
    assert not torch.equal(model.decoders[0].transformer.mask_token, model.decoders[1].transformer.mask_token)


def test_heads_that_a_checkpoint_lacks_are_initialised(tmp_path):
    """`from_pretrained` builds without memory; what is not in the file must be made."""
    small_model(tap_scales=(1, 1, 1, 1)).save_pretrained(tmp_path)
    config = LocalMIMConfig(backbone_config=small_backbone(), **SMALL_DECODER)
    model = LocalMIMForPreTraining.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    weight = model.decoders[0].head[3].weight
    assert weight.isfinite().all() and 0.05 < weight.std() < 0.5


def test_rectangles_and_other_resolutions():
    model = small_model(backbone_config=small_backbone(image_size=(64, 32), num_channels=5)).eval()
    for size in ((64, 32), (32, 96)):
        pixel_values = torch.randn(2, 5, *size)
        output = model(pixel_values)
        assert output.loss.isfinite() and output.logits[3].shape == (2, size[0] * size[1] // 256, 45)
        assert {panel.shape for panel in model.pictures(pixel_values).values()} == {pixel_values.shape}


@pytest.mark.parametrize("target", ["hog", "pixel"])
def test_pictures_show_predictions_under_the_mask_only(target):
    model = small_model(target=target).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    panels = model.pictures(pixel_values)
    hidden = pixel_mask(model(pixel_values).mask).expand(-1, 3, -1, -1)
    assert len(panels) == 2 + 2 * 4 and panels["masked"][hidden].abs().max() == 0
    # Cells of two by two patches are drawn where any of them is masked.
    for layer, size in ((0, 2), (1, 4), (2, 8)):
        drawn, truth = panels[f"layer {layer} (cells of {size} x {size})"], panels[f"true (cells of {size} x {size})"]
        torch.testing.assert_close(drawn[~hidden], truth[~hidden])
        assert not torch.allclose(drawn[hidden], truth[hidden], atol=0.1)
    if target == "pixel":
        torch.testing.assert_close(panels["true (cells of 8 x 8)"], pixel_values, rtol=1e-4, atol=1e-4)


def test_export_is_a_plain_vit_with_the_trained_norm(tmp_path):
    model = small_model().eval()
    torch.nn.init.normal_(model.backbone.layernorm.weight)
    export_encoder(model, MaskedImageProcessor(**model.config.processor_settings()), tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert type(plain) is ViTModel
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = model(pixel_values, bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool)).last_hidden_state
    torch.testing.assert_close(plain(pixel_values).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_classifier_starts_from_a_pretraining_checkpoint(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    classifier, report = LocalMIMForImageClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert torch.equal(classifier.backbone.layers[0].mlp.fc1.weight, model.backbone.layers[0].mlp.fc1.weight)
    classifier(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 2])).loss.backward()
    assert classifier.classifier.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tap_indices": (1, 1, 2, 3)}, ["[1, 1, 2, 3]", "ascending", "3"]),
        ({"tap_indices": (0, 1, 2), "tap_scales": (4, 2, 1)}, ["[0, 1, 2]", "last is 3"]),
        ({"tap_indices": (0, 3)}, ["tap_scales", "each of the 2"]),
        ({"tap_scales": (8, 2, 1, 0.5)}, ["8", "4, 2, 1, 0.5"]),
        ({"backbone_config": small_backbone(patch_size=2, image_size=8)}, ["2 x 2", "4 cells"]),
        ({"backbone_config": small_backbone(image_size=24)}, ["3 x 3", "even", "1 in place of 0.5"]),
        ({"target": "sift"}, ["sift", "hog, pixel"]),
        ({"hog_bins": 0}, ["hog_bins is 0", "9"]),
        ({"mask_ratio": 1.0}, ["1.0", "[0, 1)"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        LocalMIMConfig(**{"backbone_config": small_backbone()} | settings)
    assert all(word in str(error.value) for word in words), error.value


def test_pictures_with_an_odd_number_of_patches_are_refused():
    with pytest.raises(ValueError, match="3 x 4 patches"):
        small_model()(torch.randn(1, 3, 24, 32))


def test_no_two_masked_cells_get_the_same_prediction():
    output = LocalMIMForPreTraining(tiny_config()).eval()(torch.randn(1, 3, 32, 32))
    first, second = output.logits[2][0, output.mask[0]][:2]
    assert (first - second).abs().max() > 1e-4


@pytest.mark.slow
def test_taps_on_lower_layers_make_their_features_better():
    """Fashion-MNIST, 800 steps, beside the same network that predicts from its top layer only."""
    splits = fashion(4000, 2000)
    backbone_config = small_backbone(hidden_size=64, num_hidden_layers=6, intermediate_size=128, num_channels=1)
    decoder = {"decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 64}

    def accuracies(model) -> list[float]:
        return [knn(model, splits, layer) for layer in (2, 4, 6)]

    model = small_model(backbone_config=backbone_config, **decoder).eval()
    untrained = accuracies(model)
    four = accuracies(pretrain(model, splits[0][0], steps=800, learning_rate=2e-3))
    top = small_model(backbone_config=backbone_config, tap_indices=(-1,), tap_scales=(1,), **decoder)
    top = accuracies(pretrain(top, splits[0][0], steps=800, learning_rate=2e-3))
    assert all(after > before + 0.04 for after, before in zip(four, untrained, strict=True)), (four, untrained)
    assert sum(four) / 3 > sum(top) / 3 and four[0] > top[0], (four, top)
