"""MaskFeat against its reference, and every check of its spec (section 11) that concerns pictures."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, ViTConfig, ViTModel

from hf_masked import MaskedImageProcessor, MaskFeatConfig, MaskFeatForPreTraining, MaskFeatModel
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_image.maskfeat import convert_official_weights, official_config, tiny_config
from hf_masked.modeling.parts.hog import hog, hog_glyphs
from hf_masked.modeling.registry import get_variant
from hf_masked.training.export import export_encoder
from tests.modeling.masked_image.short_runs import fashion, knn, pretrain
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "maskfeat.json").read_text())


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-6,
    "image_size": 32,
    "patch_size": 8,
}


def small_backbone(**settings) -> ViTConfig:
    return ViTConfig(**SMALL | settings)


def small_model(seed: int = 0, **settings) -> MaskFeatForPreTraining:
    torch.manual_seed(seed)
    return MaskFeatForPreTraining(
        MaskFeatConfig(**{"backbone_config": small_backbone(), "hog_cell_size": 4} | settings)
    )


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
    model = MaskFeatForPreTraining(MaskFeatConfig(backbone_config=backbone_config)).eval()
    buffers = {name: torch.zeros(shape) for name, shape in stored["buffers"].items()}
    model.load_state_dict(convert_official_weights(filled(stored["parameters"]) | buffers, model.config))
    pixel_values = filled_pixels((stored["batch"], 3, size, size), f"{run}.pixels")
    mask = filled_noise(stored["batch"], (size // reference["patch_size"]) ** 2, f"{run}.noise") < 0.4
    assert mask.int().tolist() == stored["mask"]
    return stored, model, pixel_values, model(pixel_values, bool_masked_pos=mask)


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_target_and_predictions_are_the_references(run):
    stored, model, pixel_values, output = run_as_reference(run)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    close(output.logits.flatten(0, 1), torch.tensor(stored["pred"]).flatten(0, -2).tolist())
    close(model.target(pixel_values)[output.mask], stored["hog"])


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, _, output = run_as_reference(run)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        probe = {name: torch.zeros(stored["parameters"][name])}
        ours = [gradients.pop(converted) for converted in convert_official_weights(probe, model.config)]
        assert torch.stack([g.norm() for g in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    assert not gradients, "every parameter of ours is one of the reference's"


def official_checkpoint(width: int = 768) -> dict[str, torch.Tensor]:
    """One layer of a released ViT, as SlowFast names it."""
    stored = PARITY["pretraining"]["patch_16"]
    names = {**stored["parameters"], **stored["buffers"]}
    ours, wide = stored["config"]["embed_dim"], {}
    for name, shape in names.items():
        if not name.startswith("blocks.1."):
            wide[name] = torch.zeros([side * width // ours if side % ours == 0 else side for side in shape])
    return wide | {"pos_embed": torch.zeros(1, 17, width), "mask_token": torch.ones(1, 1, width)}


def test_official_file_converts_strictly(tmp_path):
    official = official_checkpoint()
    torch.save({"model_state": official, "epoch": 1599, "cfg": "TASK: ssl"}, tmp_path / "epoch_01600.pyth")
    model = convert(get_variant("maskfeat"), tmp_path / "epoch_01600.pyth")
    backbone = model.config.backbone_config
    assert (backbone.hidden_size, backbone.num_attention_heads, backbone.image_size) == (768, 12, 64)
    assert torch.equal(model.backbone.embeddings.mask_token, official["mask_token"])
    torch.save({"model_state": official | {"norm.weight": torch.zeros(768)}}, tmp_path / "epoch_01600.pyth")
    with pytest.raises(ValueError, match=r"left over: norm\.weight"):
        convert(get_variant("maskfeat"), tmp_path / "epoch_01600.pyth")


def test_video_checkpoints_and_unknown_widths_are_refused():
    with pytest.raises(ValueError, match="MViT"):
        official_config({"patch_embed.proj.weight": torch.zeros(96, 3, 3, 7, 7)})
    with pytest.raises(ValueError, match=r"512 wide.*768, 1024"):
        official_config({"patch_embed.proj.weight": torch.zeros(512, 3, 16, 16)})


# The spec's section 11; the target's own checks are in tests/modeling/parts/test_hog.py


@pytest.mark.parametrize(("patch_size", "values"), [(16, 108), (8, 27)])
def test_values_per_patch_at_the_papers_cells(patch_size, values):
    model = MaskFeatForPreTraining(MaskFeatConfig(backbone_config=small_backbone(patch_size=patch_size)))
    pixel_values = torch.randn(1, 3, 32, 32)
    assert model(pixel_values).logits.shape == model.target(pixel_values).shape == (1, (32 // patch_size) ** 2, values)


def test_masks_are_blocks_of_the_papers_size():
    """The reference stops at 78 of 196 or a little below; ours have the one count of all our masks, 79."""
    config = MaskFeatConfig(backbone_config=small_backbone(image_size=224, patch_size=16))
    processor = MaskedImageProcessor(**config.processor_settings())
    given = processor([torch.zeros(3, 224, 224, dtype=torch.uint8)] * 8, seed=0)["bool_masked_pos"]
    drawn = MaskFeatForPreTraining(config).draw_mask(torch.zeros(8, 3, 224, 224), (14, 14))
    for mask in (given, drawn):
        assert mask.sum(dim=1).tolist() == [79] * 8
        grid = mask.view(8, 14, 14)
        same = (grid[:, 1:] == grid[:, :-1]).float().mean() + (grid[:, :, 1:] == grid[:, :, :-1]).float().mean()
        # Independent patches would agree with a neighbour at 0.4 ** 2 + 0.6 ** 2 = 0.52.
        assert same / 2 > 0.75


def test_loss_is_the_papers_written_as_loops():
    model = small_model()
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    cells = hog(pixel_values, (4, 4))
    total, count = 0.0, 0
    for sample, unit in output.mask.nonzero().tolist():
        row, column = divmod(unit, 4)
        target = cells[sample, :, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
        total += (output.logits[sample, unit] - target).square().mean()
        count += 1
    torch.testing.assert_close(output.loss, total / count, rtol=1e-5, atol=0)


def test_loss_ignores_visible_patches():
    model = small_model()
    output = model(torch.randn(2, 3, 32, 32))
    output.logits.retain_grad()
    output.loss.backward()
    assert output.logits.grad[~output.mask].abs().max() == 0
    assert output.logits.grad[output.mask].abs().min() > 0


def test_pixels_under_the_mask_are_seen_by_the_target_only():
    model = small_model().eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    changed = torch.where(pixel_mask(output.mask), torch.randn_like(pixel_values), pixel_values)
    other = model(changed, bool_masked_pos=output.mask)
    assert torch.equal(other.logits, output.logits) and not torch.equal(other.loss, output.loss)


def test_predicting_nothing_costs_one_ninth():
    """Every histogram has length 1 and nine entries: the scale to which the paper's clipping at 0.02 belongs."""
    model = small_model()
    torch.nn.init.zeros_(model.head.weight)
    torch.testing.assert_close(model(torch.randn(4, 3, 32, 32)).loss, torch.tensor(1 / 9))


def test_class_token_never_enters_the_head():
    model = small_model()
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = model(torch.randn(2, 3, 32, 32))
    assert torch.equal(seen[0], output.last_hidden_state[:, 1:])


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2"])
@pytest.mark.parametrize("masked", [True, False])
def test_encoder_is_the_stock_backbone(model_type, masked):
    backbone_config = AutoConfig.for_model(model_type, **SMALL)
    model = small_model(backbone_config=backbone_config).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    mask = model(pixel_values).mask if masked else None
    expected = model.backbone(pixel_values, bool_masked_pos=mask).last_hidden_state
    encoder = MaskFeatModel(model.config).eval()
    encoder.backbone.load_state_dict(model.backbone.state_dict())
    torch.testing.assert_close(encoder(pixel_values, mask).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 5])
def test_rectangles_and_other_resolutions(channels):
    model = small_model(backbone_config=small_backbone(image_size=(64, 32), num_channels=channels)).eval()
    for size in ((64, 32), (32, 96)):
        pixel_values = torch.randn(2, channels, *size)
        output = model(pixel_values)
        assert output.logits.shape == (2, size[0] * size[1] // 64, channels * 9 * 4) and output.loss.isfinite()
        assert {panel.shape for panel in model.pictures(pixel_values).values()} == {pixel_values.shape}


def test_pictures_show_predictions_under_the_mask_only():
    model = small_model().eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    output, panels = model(pixel_values), model.pictures(pixel_values)
    hidden = pixel_mask(output.mask).expand(-1, 3, -1, -1)
    assert list(panels) == ["picture", "masked", "predicted HOG", "true HOG"]
    assert panels["masked"][hidden].abs().max() == 0 and torch.equal(panels["masked"][~hidden], pixel_values[~hidden])
    truth = hog_glyphs(hog(pixel_values, (4, 4)), (4, 4), pixel_values)
    assert torch.equal(panels["true HOG"], truth)
    assert torch.equal(panels["predicted HOG"][~hidden], truth[~hidden])
    assert not torch.allclose(panels["predicted HOG"][hidden], truth[hidden], atol=0.1)


def test_initialization_is_the_papers():
    model = small_model(backbone_config=small_backbone(hidden_size=256, intermediate_size=512))
    embeddings, layer = model.backbone.embeddings, model.backbone.layers[0]
    for tensor in (
        *(embeddings.cls_token, embeddings.mask_token, embeddings.position_embeddings),
        *(embeddings.patch_embeddings.projection.weight, layer.attention.q_proj.weight, layer.mlp.fc2.weight),
        model.head.weight,
    ):
        assert 0.015 < tensor.std() < 0.025 and tensor.requires_grad
    assert layer.mlp.fc2.bias.abs().max() == model.head.bias.abs().max() == 0


def test_parameter_count_of_the_base_model():
    with torch.device("meta"):
        model = MaskFeatForPreTraining(MaskFeatConfig())
    # ViT-B/16 (85,798,656 with positions and norm), the mask token and the head.
    assert sum(p.numel() for p in model.parameters()) == 85_798_656 + 768 + (768 + 1) * 108


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_ratio": 1.0}, ["1.0", "[0, 1)", "0.4"]),
        ({"mask_kind": "spiral"}, ["spiral", "block"]),
        ({"hog_cell_size": 3}, ["hog_cell_size=3", "8 x 8", "divisor"]),
        ({"hog_bins": 0}, ["hog_bins is 0", "9"]),
        ({"backbone_config": {"model_type": "vit", "image_size": 30, "patch_size": 8}}, ["30 x 30", "8 x 8"]),
        ({"backbone_config": {"model_type": "resnet"}}, ["resnet", "vit"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        MaskFeatConfig(**{"backbone_config": small_backbone(), "hog_cell_size": 4} | settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("pixels", "mask", "words"),
    [
        ((2, 1, 32, 32), None, ["1 channels", "num_channels=1"]),
        ((2, 3, 36, 32), None, ["36 x 32", "8 x 8"]),
        ((2, 3, 32, 32), torch.zeros(2, 9, dtype=torch.bool), ["(2, 9)", "(2, 16)"]),
    ],
)
def test_inputs_that_do_not_fit_say_so(pixels, mask, words):
    with pytest.raises(ValueError) as error:
        small_model()(torch.randn(pixels), bool_masked_pos=mask)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("model_type", ["vit", "dinov2"])
def test_export_has_no_mask_token_and_gives_the_same(model_type, tmp_path):
    model = small_model(backbone_config=AutoConfig.for_model(model_type, **SMALL)).eval()
    export_encoder(model, MaskedImageProcessor(**model.config.processor_settings()), tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    assert plain.embeddings.mask_token is None
    pixel_values = torch.randn(2, 3, 32, 32)
    expected = MaskFeatModel(model.config).eval()
    expected.backbone.load_state_dict(model.backbone.state_dict())
    torch.testing.assert_close(
        plain(pixel_values).last_hidden_state, expected(pixel_values).last_hidden_state, rtol=1e-5, atol=1e-5
    )


def test_starts_from_a_vit_without_a_mask_token(tmp_path):
    vit = ViTModel(small_backbone())
    vit.save_pretrained(tmp_path)
    model = MaskFeatForPreTraining.from_backbone(str(tmp_path), hog_cell_size=4)
    assert 0.01 < model.backbone.embeddings.mask_token.std() < 0.03
    assert torch.equal(model.backbone.layers[1].mlp.fc1.weight, vit.layers[1].mlp.fc1.weight)


def test_no_two_masked_patches_get_the_same_prediction():
    output = MaskFeatForPreTraining(tiny_config()).eval()(torch.randn(1, 3, 32, 32))
    first, second = output.logits[0, output.mask[0]][:2]
    assert (first - second).abs().max() > 1e-4


@pytest.mark.slow
def test_learns_more_than_the_mean_hog_of_the_data():
    """Fashion-MNIST, 600 steps: predictions follow the picture at hand, and so do the features."""
    splits = fashion(4000, 1000)
    (pictures, _), (unseen, _) = splits
    backbone_config = small_backbone(hidden_size=64, num_hidden_layers=3, intermediate_size=128, num_channels=1)
    model = small_model(backbone_config=backbone_config).eval()
    untrained = knn(model, splits)
    pretrain(model, pictures, steps=600)
    with torch.no_grad():
        output = model(unseen)
        target, predicted = model.target(unseen)[output.mask], output.logits[output.mask]
        # At each place the mean over the training pictures.
        mean = model.target(pictures).mean(dim=0).expand(len(unseen), -1, -1)[output.mask]
    assert output.loss < 0.9 * (target - mean).square().mean()
    assert torch.corrcoef(torch.stack([predicted.flatten(), target.flatten()]))[0, 1] > 0.5
    assert knn(model, splits) > untrained + 0.05
