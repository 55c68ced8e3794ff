"""ColorMAE against its reference: the masks, and that all else is MAE. `tests/processing/test_color_masks.py` has what
the noise promises."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig

from hf_masked import ColorMAEConfig, ColorMAEForPreTraining, MAEConfig, MAEForPreTraining, MaskedImageProcessor
from hf_masked.modeling.masked_image.colormae import convert_official_weights, official_config, tiny_config
from hf_masked.modeling.masked_image.mae import tiny_config as tiny_mae
from hf_masked.modeling.parts.position_embeddings import sincos_positions_2d
from hf_masked.processing.masks import color, color_mask
from hf_masked.randomness import given_draw
from hf_masked.training.optimization import parameter_groups
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "colormae.json").read_text())


@pytest.mark.parametrize("run", PARITY["masks"], ids=lambda run: f"{run['grid']}-{run['ratio']}")
def test_masks_of_a_bank_are_the_references(run, monkeypatch):
    fields, size = PARITY["bank"]["fields"], PARITY["bank"]["size"]
    bank = filled_noise(fields, size**2, "bank").view(fields, size, size)
    monkeypatch.setattr(color, "noise_bank", lambda *settings: bank)
    window = [(run["top"] + 0.5) / size, (run["left"] + 0.5) / size]
    flips = [0.25 if run[direction] else 0.75 for direction in ("vertical", "horizontal")]
    numbers = torch.tensor([[(field + 0.5) / fields, *window, *flips] for field in range(fields)])
    grid = (run["grid"], run["grid"])
    masks = color_mask(given_draw(numbers), grid, run["ratio"], bank_size=fields, field_size=size)
    assert masks.int().tolist() == run["mask"]


def network() -> tuple[dict, ColorMAEForPreTraining, torch.Tensor]:
    """The reference's run, our model with its weights and tables, and the pictures."""
    stored = PARITY["network"]
    reference = stored["config"]
    side = reference["img_size"] // reference["patch_size"]
    backbone_config = ViTConfig(
        hidden_size=reference["embed_dims"],
        num_hidden_layers=reference["num_layers"],
        num_attention_heads=reference["num_heads"],
        intermediate_size=reference["feedforward_channels"],
        layer_norm_eps=1e-6,
        image_size=reference["img_size"],
        patch_size=reference["patch_size"],
    )
    config = ColorMAEConfig(
        backbone_config=backbone_config,
        mask_ratio=reference["mask_ratio"],
        decoder_hidden_size=reference["decoder_embed_dim"],
        decoder_num_hidden_layers=reference["decoder_depth"],
        decoder_num_attention_heads=reference["decoder_num_heads"],
        decoder_intermediate_size=4 * reference["decoder_embed_dim"],
    )
    model = ColorMAEForPreTraining(config).eval()
    tables = {
        "backbone.pos_embed": mmpretrain_table(reference["embed_dims"], side),
        "neck.decoder_pos_embed": mmpretrain_table(reference["decoder_embed_dim"], side),
    }
    model.load_state_dict(convert_official_weights(filled(stored["parameters"]) | tables, config))
    size = (stored["batch"], 3, reference["img_size"], reference["img_size"])
    return stored, model, filled_pixels(size, "network.pixels")


def mmpretrain_table(width: int, side: int) -> torch.Tensor:
    """mmpretrain's tables count rows first, MAE's columns."""
    return torch.cat([torch.zeros(1, width), sincos_positions_2d(width, (side, side), first_axis="row")]).unsqueeze(0)


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.as_tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


def test_loss_and_outputs_of_the_network_are_the_references():
    stored, model, pixel_values = network()
    output = model(pixel_values, torch.tensor(stored["mask"]).bool())
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    close(output.logits, stored["pred"])
    # The reference keeps its tokens in the descending order of the noise, ours are in raster order.
    order = torch.tensor(stored["ids_keep"]).argsort(dim=1)
    latent = torch.tensor(stored["latent"])
    tokens = latent[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, latent.shape[-1]))
    close(output.last_hidden_state, torch.cat([latent[:, :1], tokens], dim=1))


def test_gradients_of_the_network_are_the_references():
    stored, model, pixel_values = network()
    model(pixel_values, torch.tensor(stored["mask"]).bool()).loss.backward()
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        probe = convert_official_weights({name: torch.zeros(stored["parameters"][name])}, model.config)
        found = torch.stack([model.get_parameter(ours).grad.norm() for ours in probe]).norm().item()
        assert found == pytest.approx(norm, rel=1e-4), name


def twin_of_mae(**settings) -> tuple[ColorMAEForPreTraining, MAEForPreTraining]:
    torch.manual_seed(0)
    mae = MAEForPreTraining(tiny_mae()).eval()
    model = ColorMAEForPreTraining(ColorMAEConfig(**without_type(tiny_config()) | settings)).eval()
    model.load_state_dict(mae.state_dict())
    return model, mae


def without_type(config) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}


def test_with_the_same_mask_it_is_mae():
    model, mae = twin_of_mae()
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    same = mae(pixel_values, output.mask)
    assert torch.equal(output.loss, same.loss) and torch.equal(output.logits, same.logits)
    assert not torch.equal(output.mask, mae(pixel_values).mask)


def test_white_noise_is_maes_random_mask():
    model, mae = twin_of_mae(mask_options={"color": "white"})
    pixel_values, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    ours, theirs = model(pixel_values, noise=noise), mae(pixel_values, noise=noise)
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.loss, theirs.loss)


def test_network_and_parameters_are_maes():
    with torch.device("meta"):
        model = ColorMAEForPreTraining(ColorMAEConfig())
    count = sum(p.numel() for p in model.parameters()) + model.decoder.position_embeddings.numel()
    assert count == 111_907_840  # 111.91 M
    settings = MAEConfig().to_dict() | {"model_type": "hf_masked_colormae", "mask_kind": "color"}
    assert ColorMAEConfig().to_dict() == settings


def test_masks_are_of_the_colour_that_the_config_says():
    config = tiny_config()
    config.mask_options = {"color": "red", "field_size": 16}
    processor = MaskedImageProcessor(**config.processor_settings())
    assert processor.mask_kind == "color" and processor.mask_options == {"color": "red", "field_size": 16}
    with pytest.raises(ValueError, match=r"'pink'; known are red, blue"):
        MaskedImageProcessor(**config.processor_settings() | {"mask_options": {"color": "pink"}})


def test_tokens_and_positions_do_not_decay():
    model = ColorMAEForPreTraining(tiny_config())
    without = {id(p) for group in parameter_groups(model, 0.05) if not group["weight_decay"] for p in group["params"]}
    assert {id(model.backbone.embeddings.cls_token), id(model.decoder.mask_token)} <= without
    assert id(model.decoder.head.weight) not in without


def official_shapes(width=768, decoder_width=512, depth=2, decoder_depth=1, grid=4) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official pretraining checkpoint, which is mmpretrain's (fewer blocks and patches)."""
    shapes = {
        "backbone.cls_token": (1, 1, width),
        "backbone.pos_embed": (1, grid**2 + 1, width),
        "backbone.patch_embed.projection.weight": (width, 3, 16, 16),
        "backbone.patch_embed.projection.bias": (width,),
        "neck.mask_token": (1, 1, decoder_width),
        "neck.decoder_pos_embed": (1, grid**2 + 1, decoder_width),
        "neck.decoder_embed.weight": (decoder_width, width),
        "neck.decoder_embed.bias": (decoder_width,),
        "neck.decoder_pred.weight": (768, decoder_width),
        "neck.decoder_pred.bias": (768,),
    }
    for blocks, norm, number, size in (
        ("backbone.layers", "backbone.ln1", depth, width),
        ("neck.decoder_blocks", "neck.ln1", decoder_depth, decoder_width),
    ):
        norms = [norm, *(f"{blocks}.{i}.ln{k}" for i in range(number) for k in (1, 2))]
        shapes |= {f"{name}.{kind}": (size,) for name in norms for kind in ("weight", "bias")}
        linears = {
            "attn.qkv": (3 * size, size),
            "attn.proj": (size, size),
            "ffn.layers.0.0": (4 * size, size),
            "ffn.layers.1": (size, 4 * size),
        }
        for i in range(number):
            for name, shape in linears.items():
                shapes |= {f"{blocks}.{i}.{name}.weight": shape, f"{blocks}.{i}.{name}.bias": shape[:1]}
    return shapes


def test_official_checkpoints_convert_whole_with_their_positions():
    official = filled(official_shapes())
    official["backbone.pos_embed"] = mmpretrain_table(768, 4)
    config = official_config(official)
    assert type(config) is ColorMAEConfig and config.mask_kind == "color"
    assert config.backbone_config.image_size == 64 and config.decoder_num_hidden_layers == 1
    model = ColorMAEForPreTraining(config)
    model.load_state_dict(convert_official_weights(official, config))
    assert torch.equal(model.backbone.embeddings.position_embeddings, mmpretrain_table(768, 4))
    assert model(filled_pixels((1, 3, 64, 64))).loss.isfinite()
