"""MAE against its reference, transformers' own class, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForPreTraining, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from hf_masked import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.masked_image.mae import convert_official_weights, official_config, tiny_config
from hf_masked.modeling.parts.patches import patchify, unpatchify
from hf_masked.modeling.parts.targets import normalize_patches
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "mae.json").read_text())
TABLES = {"backbone.embeddings.position_embeddings", "decoder.position_embeddings"}


def config_of(reference: dict, **settings) -> MAEConfig:
    """Our config for the arguments of the reference's constructor."""
    width = reference["embed_dim"]
    backbone_config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=reference["depth"],
        num_attention_heads=reference["num_heads"],
        intermediate_size=width * reference["mlp_ratio"],
        layer_norm_eps=reference["layer_norm_eps"],
        image_size=reference["img_size"],
        patch_size=reference["patch_size"],
    )
    if "decoder_depth" in reference:
        settings |= {
            "mask_ratio": reference["mask_ratio"],
            "norm_pix_loss": reference["norm_pix_loss"],
            "decoder_hidden_size": reference["decoder_embed_dim"],
            "decoder_num_hidden_layers": reference["decoder_depth"],
            "decoder_num_attention_heads": reference["decoder_num_heads"],
            "decoder_intermediate_size": reference["decoder_embed_dim"] * reference["mlp_ratio"],
        }
    return MAEConfig(backbone_config=backbone_config, **settings)


def load_filled(model: torch.nn.Module, shapes: dict) -> None:
    """Fills by the reference's names and converts; only the fixed tables, which are ours to make, may be missing."""
    report = model.load_state_dict(convert_official_weights(filled(shapes), model.config), strict=False)
    assert set(report.missing_keys) <= TABLES and not report.unexpected_keys


def pixels_of(run: str, reference: dict, batch: int) -> torch.Tensor:
    return filled_pixels((batch, 3, reference["img_size"], reference["img_size"]), f"{run}.pixels")


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    model = MAEForPreTraining(config_of(stored["config"])).eval()
    load_filled(model, stored["parameters"])
    units = (stored["config"]["img_size"] // stored["config"]["patch_size"]) ** 2
    output = model(
        pixels_of(run, stored["config"], stored["batch"]), noise=filled_noise(stored["batch"], units, f"{run}.noise")
    )
    return stored, model, output


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_and_outputs_are_the_references(run):
    stored, _, output = run_as_reference(run)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    assert output.mask.int().tolist() == stored["mask"]
    close(output.logits, stored["pred"])
    # The reference keeps its tokens in the order of the noise, ours are in raster order.
    order = torch.tensor(stored["ids_keep"]).argsort(dim=1)
    latent = torch.tensor(stored["latent"])
    tokens = latent[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, latent.shape[-1]))
    close(output.last_hidden_state, torch.cat([latent[:, :1], tokens], dim=1).tolist())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, output = run_as_reference(run)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        probe = {name: torch.zeros(stored["parameters"][name])}
        ours = [gradients[converted] for converted in convert_official_weights(probe, model.config)]
        assert torch.stack([g.norm() for g in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name


def test_position_tables_are_the_references():
    stored = PARITY["pretraining"]["plain"]
    model = MAEForPreTraining(config_of(stored["config"]))
    tables = convert_official_weights(
        {name: torch.tensor(table) for name, table in stored["position_tables"].items()}, model.config
    )
    assert set(tables) == TABLES
    for name, table in tables.items():
        torch.testing.assert_close(model.state_dict()[name].view_as(table), table, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("run", "pooling"), [("class_token", "cls"), ("global_pool", "mean")])
def test_classifier_is_the_references(run, pooling):
    stored = PARITY["finetuning"][run]
    config = config_of(stored["config"], classifier_pooling=pooling, num_labels=stored["config"]["num_classes"])
    model = MAEForImageClassification(config).eval()
    load_filled(model, stored["parameters"])
    close(model(pixels_of(run, stored["config"], stored["batch"])).logits, stored["logits"])


def transformers_twin(model: MAEForPreTraining) -> ViTMAEForPreTraining:
    """transformers' class with our weights and our position tables."""
    ours, backbone = model.config, model.config.backbone_config
    config = ViTMAEConfig(
        **{name: getattr(backbone, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        intermediate_size=backbone.intermediate_size,
        image_size=backbone.image_size,
        patch_size=backbone.patch_size,
        layer_norm_eps=backbone.layer_norm_eps,
        decoder_hidden_size=ours.decoder_hidden_size,
        decoder_num_hidden_layers=ours.decoder_num_hidden_layers,
        decoder_num_attention_heads=ours.decoder_num_attention_heads,
        decoder_intermediate_size=ours.decoder_intermediate_size,
        mask_ratio=ours.mask_ratio,
        norm_pix_loss=ours.norm_pix_loss,
    )
    twin = ViTMAEForPreTraining(config).eval()
    weights = model.state_dict()
    renamed = {name.replace("backbone.", "vit.", 1): value for name, value in weights.items() if "backbone" in name}
    decoder = {
        "decoder.embedding": "decoder.decoder_embed",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.position_embeddings": "decoder.decoder_pos_embed",
        "decoder.norm": "decoder.decoder_norm",
        "decoder.head": "decoder.decoder_pred",
    }
    for i in range(ours.decoder_num_hidden_layers):
        for here, there in {
            "attention_norm": "layernorm_before",
            "feed_forward_norm": "layernorm_after",
            "attention.projection": "attention.o_proj",
            "feed_forward.0": "mlp.fc1",
            "feed_forward.2": "mlp.fc2",
        }.items():
            decoder[f"decoder.layers.{i}.{here}"] = f"decoder.decoder_layers.{i}.{there}"
        for kind in ("weight", "bias"):
            parts = weights[f"decoder.layers.{i}.attention.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                renamed[f"decoder.decoder_layers.{i}.attention.{name}_proj.{kind}"] = part
    for here, there in decoder.items():
        for name, value in weights.items():
            if name == here or name.startswith(here + "."):
                renamed[name.replace(here, there, 1)] = value
    twin.load_state_dict(renamed)
    return twin


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_transformers_class_gives_the_same_with_our_weights(norm_pix_loss):
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config()).eval()
    model.config.norm_pix_loss = norm_pix_loss
    pixel_values, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    ours, theirs = model(pixel_values, noise=noise), transformers_twin(model)(pixel_values, noise=noise)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.mask, theirs.mask.bool())


def predictions_differ(model: MAEForPreTraining) -> bool:
    output = model.eval()(torch.randn(1, 3, 32, 32))
    first, second = output.logits[0, output.mask[0]][:2]
    return (first - second).abs().max() > 1e-3


def test_transformers_class_cannot_be_pretrained_from_scratch():
    """The reason for our own class; when this fails, transformers has mended it and the README's line must go."""
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    theirs = ViTMAEForPreTraining(config).eval()
    output = theirs(torch.randn(1, 3, 32, 32))
    masked = output.logits[0, output.mask[0].bool()]
    assert theirs.vit.embeddings.position_embeddings.abs().max() == 0, "mended upstream: take the README's line out"
    assert (masked - masked[0]).abs().max() < 1e-5


@pytest.mark.parametrize("route", ["constructed", "saved and loaded", "built on the meta device"])
def test_our_tables_are_the_papers_by_every_route(route, tmp_path):
    model = MAEForPreTraining(tiny_config())
    expected = {name: model.state_dict()[name].clone() for name in TABLES}
    if route != "constructed":
        model.save_pretrained(tmp_path)
    if route == "saved and loaded":
        model = AutoModelForPreTraining.from_pretrained(tmp_path)
    if route == "built on the meta device":
        # from_pretrained builds on the meta device; without the weights of the tables it must make them itself.
        from safetensors.torch import load_file, save_file

        weights = load_file(tmp_path / "model.safetensors")
        save_file(
            {name: value for name, value in weights.items() if "position_embeddings" not in name},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        model = MAEForPreTraining.from_pretrained(tmp_path)
    for name, table in expected.items():
        assert torch.equal(model.state_dict()[name], table), name
        assert table[:, 0].abs().max() == 0 and table[:, 1:].abs().max() == 1
    assert not model.backbone.embeddings.position_embeddings.requires_grad
    assert predictions_differ(model)


def test_parameter_count_of_the_base_model():
    with torch.device("meta"):
        model = MAEForPreTraining(MAEConfig())
    parameters = sum(p.numel() for p in model.parameters())
    tables = model.backbone.embeddings.position_embeddings.numel(), model.decoder.position_embeddings.numel()
    assert tables == (151_296, 100_864)
    assert parameters + tables[1] == 111_907_840
    assert sum(p.numel() for p in model.backbone.parameters() if p.requires_grad) == 85_647_360
    assert sum(p.numel() for p in model.decoder.parameters()) == 26_008_320


def test_counts_at_224_pixels():
    model = MAEForPreTraining(MAEConfig(backbone_config=small_backbone(image_size=224, patch_size=16)))
    mask = model.draw_mask(torch.zeros(2, 3, 224, 224), (14, 14))
    assert mask.sum(dim=1).tolist() == [147, 147] and (~mask).sum(dim=1).tolist() == [49, 49]


def test_decoder_does_not_grow_with_the_encoder():
    def inner_parameters(width):
        decoder = MAEForPreTraining(MAEConfig(backbone_config=small_backbone(hidden_size=width))).decoder
        outer = {id(p) for part in (decoder.embedding, decoder.head) for p in part.parameters()}
        return sum(p.numel() for p in decoder.parameters() if id(p) not in outer)

    assert inner_parameters(32) == inner_parameters(64)


def small_backbone(**settings) -> ViTConfig:
    return ViTConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "layer_norm_eps": 1e-6,
            "image_size": 32,
            "patch_size": 8,
        }
        | settings
    )


def pixel_mask(mask: torch.Tensor) -> torch.Tensor:
    """bool (batch, 1, 32, 32) of the pixels under masked patches of 8."""
    return mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_encoder_does_not_see_masked_pixels():
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 32, 32, requires_grad=True)
    output = model(pixel_values)
    output.last_hidden_state.square().sum().backward()
    hidden = pixel_mask(output.mask).expand(-1, 3, -1, -1)
    assert pixel_values.grad[hidden].abs().max() == 0
    assert pixel_values.grad[~hidden].abs().min() > 0
    changed = torch.where(hidden, torch.randn_like(pixel_values), pixel_values)
    assert torch.equal(model(changed, bool_masked_pos=output.mask).logits, output.logits)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_reads_masked_predictions_only(norm_pix_loss):
    config = tiny_config()
    config.norm_pix_loss = norm_pix_loss
    model = MAEForPreTraining(config)
    output = model(torch.randn(2, 3, 32, 32))
    output.logits.retain_grad()
    output.loss.backward()
    assert output.logits.grad[~output.mask].abs().max() == 0
    assert output.logits.grad[output.mask].abs().max() > 0


def test_loss_is_the_papers_equation_written_as_loops():
    model = MAEForPreTraining(tiny_config())
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    total, count = 0.0, 0
    for sample in range(2):
        for unit in output.mask[sample].nonzero().flatten().tolist():
            row, column = divmod(unit, 4)
            patch = pixel_values[sample, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            target = ((patch - patch.mean()) / (patch.var() + 1e-6).sqrt()).permute(1, 2, 0).flatten()
            total += (output.logits[sample, unit] - target).square().mean()
            count += 1
    torch.testing.assert_close(output.loss, total / count, rtol=1e-5, atol=0)


def test_order_of_the_noise_among_kept_tokens_does_not_matter():
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config()).eval()
    pixel_values, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    smallest = noise.argsort(dim=1)[:, :4]
    permuted = noise.scatter(1, smallest, noise.gather(1, smallest.flip(1)))
    assert not torch.equal(noise, permuted)
    assert torch.equal(model(pixel_values, noise=noise).logits, model(pixel_values, noise=permuted).logits)


def test_without_masking_the_encoder_is_the_plain_vit(tmp_path):
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny_config()).eval()
    model.save_pretrained(tmp_path / "ours")
    model.backbone.save_pretrained(tmp_path / "plain")
    pixel_values = torch.randn(2, 3, 32, 32)
    plain = ViTModel.from_pretrained(tmp_path / "plain", add_pooling_layer=False).eval()
    encoder = MAEModel.from_pretrained(tmp_path / "ours").eval()
    expected = plain(pixel_values).last_hidden_state
    torch.testing.assert_close(encoder(pixel_values).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    model.config.mask_ratio = 0.0
    output = model(pixel_values)
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert output.loss == 0 and output.mask.sum() == 0


def test_unpatchify_inverts_patchify():
    pixel_values = torch.randn(2, 5, 24, 8)
    patches = patchify(pixel_values, (4, 8))
    assert patches.shape == (2, 6, 160)
    assert torch.equal(unpatchify(patches, (6, 1), (4, 8)), pixel_values)
    # (row in patch, column in patch, channel)
    assert torch.equal(patches[0, 0, :5], pixel_values[0, :, 0, 0])
    assert torch.equal(patches[0, 0, 5:10], pixel_values[0, :, 0, 1])


def test_normalized_targets_have_no_mean_and_unit_variance():
    targets = normalize_patches(torch.randn(4, 9, 48) * 3 + 5)
    assert targets.mean(dim=-1).abs().max() < 1e-5
    variance = targets.var(dim=-1)
    assert variance.max() < 1 + 1e-5 and variance.min() > 0.999


def test_initialization_is_the_papers():
    torch.manual_seed(0)
    model = MAEForPreTraining(MAEConfig(backbone_config=small_backbone(hidden_size=192, intermediate_size=768)))
    layer = model.backbone.layers[0]
    bounds = {
        layer.attention.q_proj: (6 / (4 * 192)) ** 0.5,  # one third of a (3 hidden, hidden) matrix
        layer.attention.o_proj: (6 / (2 * 192)) ** 0.5,
        layer.mlp.fc1: (6 / (192 + 768)) ** 0.5,
        model.decoder.embedding: (6 / (192 + 512)) ** 0.5,
        model.decoder.layers[0].attention.qkv: (6 / (4 * 512)) ** 0.5,
        model.backbone.embeddings.patch_embeddings.projection: (6 / (192 + 8 * 8 * 3)) ** 0.5,
    }
    for module, bound in bounds.items():
        assert 0.98 * bound < module.weight.abs().max() <= bound, module
    for token in (model.backbone.embeddings.cls_token, model.decoder.mask_token):
        assert 0.01 < token.std() < 0.03
    assert layer.attention.q_proj.bias.abs().max() == 0


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2"])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_rectangles_channels_and_other_resolutions(model_type, channels, tmp_path):
    backbone_config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=(224, 112),
        patch_size=16,
        num_channels=channels,
    )
    model = MAEForPreTraining(MAEConfig(backbone_config=backbone_config, decoder_hidden_size=32)).eval()
    pixel_values = torch.randn(2, channels, 224, 112)
    assert model(pixel_values).logits.shape == (2, 14 * 7, 256 * channels)
    panels = model.pictures(pixel_values)
    assert {panel.shape for panel in panels.values()} == {pixel_values.shape}
    other = torch.randn(2, channels, 96, 160)
    output = model(other)
    assert output.logits.shape == (2, 6 * 10, 256 * channels) and output.loss.isfinite()
    model.save_pretrained(tmp_path)
    classifier = MAEForImageClassification.from_pretrained(tmp_path, num_labels=3)
    classifier(other, labels=torch.tensor([0, 2])).loss.backward()


def test_interpolated_positions_follow_the_picture_not_a_square():
    """At twice the height the even rows' positions stay those of the table, whatever the width does."""
    backbone_config = small_backbone(image_size=(32, 64))
    model = MAEModel(MAEConfig(backbone_config=backbone_config)).eval()
    wide, tall = torch.zeros(1, 3, 32, 64), torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        model.backbone.layers = torch.nn.ModuleList()
        model.backbone.layernorm = torch.nn.Identity()
        short, long = model(wide).last_hidden_state[0, 1:], model(tall).last_hidden_state[0, 1:]
    rows = long.view(4 * 2, 8, -1)
    # The middle between two interpolated rows is about the table's row between them.
    middle = (rows[2] + rows[3]) / 2
    torch.testing.assert_close(middle, short.view(4, 8, -1)[1], rtol=0, atol=0.15)
    assert (rows[0, :, :] - rows[-1, :, :]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_ratio": 1.0}, ["1.0", "[0, 1)"]),
        ({"mask_kind": "spiral"}, ["spiral", "random"]),
        ({"backbone_config": {"model_type": "vit", "image_size": 30, "patch_size": 8}}, ["30 x 30", "8 x 8"]),
        ({"backbone_config": {"model_type": "resnet"}}, ["resnet", "vit"]),
        ({"decoder_hidden_size": 100, "decoder_num_attention_heads": 16}, ["100", "16"]),
        ({"classifier_pooling": "max"}, ["max", "mean"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        MAEConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("pixels", "mask", "words"),
    [
        ((2, 1, 32, 32), None, ["1 channels", "num_channels=1"]),
        ((3, 32, 32), None, ["(3, 32, 32)", "batch"]),
        ((2, 3, 36, 32), None, ["36 x 32", "8 x 8"]),
        ((2, 3, 32, 32), torch.zeros(2, 9, dtype=torch.bool), ["(2, 9)", "(2, 16)"]),
        ((2, 3, 32, 32), torch.zeros(2, 16), ["float32", "bool"]),
        ((2, 3, 32, 32), torch.eye(16, dtype=torch.bool)[:2] | (torch.arange(2)[:, None] == 0), ["1 to 16"]),
    ],
)
def test_inputs_that_do_not_fit_say_so(pixels, mask, words):
    model = MAEForPreTraining(tiny_config())
    with pytest.raises(ValueError) as error:
        model(torch.randn(pixels), bool_masked_pos=mask)
    assert all(word in str(error.value) for word in words), error.value


def test_from_backbone_keeps_the_pretrained_weights_and_positions(tmp_path):
    vit = ViTModel(small_backbone())
    vit.save_pretrained(tmp_path)
    model = MAEForPreTraining.from_backbone(str(tmp_path), mask_ratio=0.5, decoder_hidden_size=32)
    assert model.config.mask_ratio == 0.5
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, vit.state_dict()[name]), name
    assert model.backbone.embeddings.position_embeddings.requires_grad


def test_official_config_is_read_from_the_shapes():
    shapes = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.0.mlp.fc1.weight": (3072, 768),
        "blocks.11.mlp.fc1.weight": (3072, 768),
        "decoder_embed.weight": (512, 768),
        "decoder_blocks.7.mlp.fc1.weight": (2048, 512),
        "decoder_blocks.0.mlp.fc1.weight": (2048, 512),
    }
    config = official_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert config.to_diff_dict() == MAEConfig().to_diff_dict()


def test_training_predicts_better_than_the_patch_mean_and_uses_the_positions():
    """Stripes whose phase the visible patches tell: what a decoder without positions cannot learn."""
    torch.manual_seed(0)
    config = tiny_config()
    config.decoder_hidden_size, config.decoder_intermediate_size = 32, 64
    model = MAEForPreTraining(config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)

    def batch():
        across = torch.arange(32) / 32
        phase, count = torch.rand(64, 1, 1), torch.randint(1, 3, (64, 1, 1))
        wave = (2 * torch.pi * (count * across[None, None, :] + count * across[None, :, None] + phase)).sin()
        return wave[:, None].expand(-1, 3, -1, -1)

    for _ in range(350):
        loss = model(batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    pictures = batch()
    with torch.no_grad():
        trained = model(pictures).loss
        table = model.decoder.position_embeddings
        table[:, 1:] = table[:, 1:][:, torch.randperm(16)]
        shuffled = model(pictures).loss
    assert trained < 0.5, "1.0 is the level of predicting each patch's mean"
    assert shuffled > trained + 0.5
