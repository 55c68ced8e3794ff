"""CroCo against its reference, and every check of its spec (section 11)."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_masked import (
    CroCoConfig,
    CroCoEncoder,
    CroCoEncoderConfig,
    CroCoForBinocularPrediction,
    CroCoForDepthEstimation,
    CroCoForImageClassification,
    CroCoForPreTraining,
    CroCoModel,
    CropPairImageProcessor,
)
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sets import make_sets
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d
from hf_masked.modeling.parts.rotary import rotate
from hf_masked.modeling.registry import get_variant
from hf_masked.modeling.siamese.croco import convert_official_weights, official_config, tile_starts, tiny_config
from hf_masked.modeling.siamese.croco_encoder import rope_angles
from hf_masked.training.optimization import parameter_groups
from tests.modeling.siamese.views import views
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "croco.json").read_text())
PRETRAINING, DOWNSTREAM = PARITY["pretraining"], PARITY["downstream"]
HEADS = {
    "depth": CroCoForDepthEstimation,
    "stereo": CroCoForBinocularPrediction,
    "flow": CroCoForBinocularPrediction,
}
POSITIONS = ("sincos", "rope")


def tiny(positions: str = "sincos", **settings) -> CroCoConfig:
    config = tiny_config()
    encoder = config.backbone_config.to_dict() | {"position_embedding_type": positions}
    return CroCoConfig(**config.to_dict() | {"backbone_config": encoder} | settings)


def small_model(kind=CroCoForPreTraining, positions: str = "sincos", seed: int = 0, **settings):
    torch.manual_seed(seed)
    return kind(tiny(positions, **settings)).eval()


def same(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.as_tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


# --- parity ---


def config_of(run: dict) -> CroCoConfig:
    """Our config for the arguments of the reference's constructors."""
    reference = run["config"]
    positions = reference.get("pos_embed", "cosine")
    encoder = CroCoEncoderConfig(
        hidden_size=reference["enc_embed_dim"],
        num_hidden_layers=reference["enc_depth"],
        num_attention_heads=reference["enc_num_heads"],
        intermediate_size=4 * reference["enc_embed_dim"],
        image_size=reference["img_size"],
        patch_size=reference["patch_size"],
        position_embedding_type="sincos" if positions == "cosine" else "rope",
    )
    settings = {"norm_pix_loss": run.get("norm_pix_loss", True), "norm_memory": reference.get("norm_im2_in_dec", True)}
    if "dec_depth" in reference:
        settings |= {
            "decoder_hidden_size": reference["dec_embed_dim"],
            "decoder_num_hidden_layers": reference["dec_depth"],
            "decoder_num_attention_heads": reference["dec_num_heads"],
            "decoder_intermediate_size": 4 * reference["dec_embed_dim"],
        }
    if "task" in run:
        settings |= {
            "head_layer_sizes": run["layer_dims"],
            "head_hidden_size": run["feature_dim"],
            "head_output_size": run["last_dim"],
        }
    if run.get("task") in ("stereo", "flow"):
        settings["binocular_task"] = run["task"]
    return CroCoConfig(backbone_config=encoder, **settings)


def reference_model(run: dict, kind):
    """Our model with the weights of a run of the reference, whose tables of positions are its own."""
    model = kind(config_of(run)).eval()
    weights = convert_official_weights(filled(run["parameters"]), model.config)
    loaded = model.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys and all(name.endswith("positions.table") for name in loaded.missing_keys)
    return model


def check_gradients(model, run: dict) -> None:
    """Norms of gradients are the reference's; None there, nothing here."""
    for parameter, norm in run["gradient_norms"].items():
        probe = convert_official_weights({parameter: torch.zeros(run["parameters"][parameter])}, model.config)
        gradients = [model.get_parameter(ours).grad for ours in probe]
        if norm is None:
            assert gradients == [None], parameter
        else:
            found = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
            assert found == pytest.approx(norm, rel=1e-4, abs=1e-7), parameter


@pytest.mark.parametrize("name", PRETRAINING)
def test_loss_outputs_and_gradients_are_the_references(name):
    run = PRETRAINING[name]
    model, mask = reference_model(run, CroCoForPreTraining), torch.tensor(run["mask"]).bool()
    size = run["config"]["img_size"]
    pixel_values = filled_pixels((run["batch"], 2, 3, size, size), f"{name}.pixels")
    output = model(pixel_values, mask)
    assert output.loss.item() == pytest.approx(run["loss"], rel=1e-5)
    same(output.logits[:1], run["pred"])
    same(output.last_hidden_state, run["latent"])
    same(model.backbone(pixel_values[:1, 1]).last_hidden_state, run["other"])
    output.loss.backward()
    check_gradients(model, run)
    for table, module in zip(run.get("position_tables", ()), (model.backbone.embeddings, model.decoder), strict=False):
        same(module.positions.table[0, :6], table)


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_dense_predictions_are_the_references(name):
    run = DOWNSTREAM[name]
    model = reference_model(run, HEADS[name])
    height, width = run["config"]["img_size"]
    binocular, channels = name != "depth", 2 if name == "flow" else 1
    pixel_values = filled_pixels((run["batch"], 1 + binocular, 3, height, width), f"{name}.pixels")
    labels = filled_pixels((run["batch"], channels, height, width), f"{name}.labels") + 2.5
    labels[:, :, :3, :5] = torch.inf
    output = model(pixel_values if binocular else pixel_values[:, 0], labels=labels.squeeze(1))
    assert model.layers_read == run["head_layers"]
    field = {"depth": "predicted_depth", "stereo": "predicted_disparity", "flow": "predicted_flow"}[name]
    found = output[field].reshape(run["batch"], channels, height, width)
    if binocular:
        found = torch.cat([found, output.uncertainty.unsqueeze(1)], dim=1)
    same(found[:, :, ::8, ::8], run["prediction"])
    assert output.loss.item() == pytest.approx(run["loss"], rel=1e-5)
    output.loss.backward()
    check_gradients(model, run)


@pytest.mark.parametrize("size", ["larger", "smaller"])
@pytest.mark.parametrize("name", ["stereo", "flow"])
def test_tiled_predictions_are_the_references(name, size):
    run = DOWNSTREAM[name]
    model, stored = reference_model(run, HEADS[name]), run["tiled"][size]
    output = model.predict_tiled(filled_pixels((1, 2, 3, *stored["size"]), f"{name}.{size}"), overlap=0.6)
    found = output.predicted_flow if name == "flow" else output.predicted_disparity.unsqueeze(1)
    same(found[:, :, ::8, ::8], stored["prediction"])
    if size == "larger":
        same(output.uncertainty[:, ::8, ::8], stored["uncertainty"])


@pytest.mark.parametrize("name", PARITY["losses"])
def test_dense_losses_are_the_references(name):
    task, kind, limit = name.split()
    limit = None if limit == "None" else float(limit)
    model = small_model(CroCoForBinocularPrediction, binocular_task=task, dense_loss=kind, max_label_norm=limit)
    channels = 2 if task == "flow" else 1
    prediction = 3 * filled_pixels((2, channels, 6, 7), f"losses.{task}.prediction")
    uncertainty = 4 * filled_pixels((2, 1, 6, 7), f"losses.{task}.uncertainty")[:, 0]
    labels = 3 * filled_pixels((2, channels, 6, 7), f"losses.{task}.labels") + 6.5
    labels[0, :, 1, 2:5] = torch.inf
    loss = model.loss(prediction, None if kind == "l1" else uncertainty, labels)
    assert loss.item() == pytest.approx(PARITY["losses"][name], rel=1e-5)


def test_tables_are_interpolated_as_the_references():
    table = sincos_positions_2d(8, (4, 4)).unsqueeze(0)
    same(interpolate_positions(table, (4, 4), (3, 5))[0], PARITY["interpolated"])


# --- conversion ---


def official_shapes(encoder: int = 768, decoder: int = 512, sincos: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint with fewer and slimmer blocks and a picture of four patches."""
    shapes = {
        "patch_embed.proj.weight": (encoder, 3, 16, 16),
        "patch_embed.proj.bias": (encoder,),
        "mask_token": (1, 1, decoder),
    }
    if sincos:
        shapes |= {"enc_pos_embed": (4, encoder), "dec_pos_embed": (4, decoder)}
    linears = {"decoder_embed": (decoder, encoder), "prediction_head": (768, decoder)}
    for stem, width in (("enc_blocks.0", encoder), ("dec_blocks.0", decoder)):
        linears |= {f"{stem}.attn.qkv": (3 * width, width), f"{stem}.attn.proj": (width, width)}
        linears |= {f"{stem}.mlp.fc1": (32, width), f"{stem}.mlp.fc2": (width, 32)}
    linears |= {f"dec_blocks.0.cross_attn.proj{end}": (decoder, decoder) for end in ("q", "k", "v", "")}
    norms = {"enc_norm": encoder, "dec_norm": decoder}
    norms |= {f"enc_blocks.0.norm{end}": encoder for end in "12"}
    norms |= {f"dec_blocks.0.norm{end}": decoder for end in ("1", "2", "3", "_y")}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}


def empty(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_official_checkpoints_convert_whole(tmp_path):
    official = filled(official_shapes())
    torch.save({"model": official, "epoch": 400}, tmp_path / "CroCo.pth")
    model = convert(get_variant("croco"), tmp_path / "CroCo.pth")
    config = model.config
    assert type(model) is CroCoForPreTraining and config.backbone_config.image_size == 32
    assert config.backbone_config.position_embedding_type == "sincos"
    assert config.backbone_config.num_attention_heads == 12 and config.decoder_num_attention_heads == 16
    assert torch.equal(model.decoder.positions.table[0], official["dec_pos_embed"])
    attention = model.backbone.layers[0].attention
    stack = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(stack, official["enc_blocks.0.attn.qkv.weight"])
    alone = {name: value for name, value in official.items() if name.startswith(("patch_embed", "enc_"))}
    torch.save({"model": alone}, tmp_path / "encoder.pth")
    assert type(convert(get_variant("croco"), tmp_path / "encoder.pth")) is CroCoModel


def test_the_config_of_v2_is_read_from_the_shapes():
    config = official_config(empty(official_shapes(1024, 768, sincos=False)))
    encoder = config.backbone_config
    assert encoder.position_embedding_type == "rope" and encoder.rope_theta == 100.0 and encoder.image_size == 224
    assert encoder.num_attention_heads == 16 and config.decoder_num_attention_heads == 12
    flow = official_config(empty(official_shapes(1024, 768, sincos=False) | {"head.dpt.head.4.bias": (3,)}))
    assert flow.binocular_task == "flow" and flow.binocular_loss == "laplacian_flow" and flow.image_size == [320, 384]
    with pytest.raises(ValueError, match=r"decoder is 640 wide.*512, 768"):
        official_config(empty(official_shapes(768, 640)))


def test_checkpoints_of_croco_stereo_make_the_binocular_model(tmp_path):
    """The head's lists repeat some of its modules, which then stand in the file twice."""
    run = DOWNSTREAM["stereo"]
    official = filled(run["parameters"])
    for number in range(4):
        stem = f"head.dpt.act_{number + 1}_postprocess."
        for name in [name for name in official if name.startswith(stem)]:
            official[name.replace(stem, f"head.dpt.act_postprocess.{number}.")] = official[name]
        layer = f"head.dpt.scratch.layer{number + 1}_rn.weight"
        official[f"head.dpt.scratch.layer_rn.{number}.weight"] = official[layer]
    torch.save({"model": official}, tmp_path / "crocostereo.pth")
    model = convert(get_variant("croco"), tmp_path / "crocostereo.pth", config_of(run))
    assert type(model) is CroCoForBinocularPrediction
    last = official["head.dpt.scratch.refinenet4.out_conv.bias"]
    assert torch.equal(model.head.fusion.layers[0].projection.bias, last)


# --- section 11 ---


def test_counts_are_the_papers():
    with torch.device("meta"):
        model = CroCoForPreTraining(CroCoConfig())

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model) == 120_076_288 and count(model.backbone) == 85_646_592
    drawn = small_model(mask_ratio=CroCoConfig().mask_ratio).draw_mask(torch.zeros(20, 3, 112, 112), (14, 14))
    assert drawn.sum(dim=1).unique().tolist() == [176]


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_output_depends_on_both_views_and_without_cross_attention_on_one(positions):
    model, pixel_values = small_model(positions=positions, mask_ratio=0.0), views(2)
    other = torch.stack([pixel_values[:, 0], pixel_values[:, 1].roll(1, 0)], dim=1)
    changed = torch.stack([pixel_values[:, 0].roll(1, 0), pixel_values[:, 1]], dim=1)
    logits = model(pixel_values).logits
    assert not torch.allclose(model(other).logits, logits) and not torch.allclose(model(changed).logits, logits)
    for layer in model.decoder.layers:
        for parameter in layer.cross_attention.o_proj.parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(model(other).logits, model(pixel_values).logits), "a masked autoencoder of view 1"
    assert not torch.allclose(model(changed).logits, model(pixel_values).logits)


def test_rotary_scores_know_differences_of_coordinates_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 3, 12, 16)
    grid = (20, 20)
    places = torch.randint(0, 15, (2, 12, 2))  # rows and columns of queries and keys

    def scores(row: int, column: int) -> torch.Tensor:
        turned = []
        for states, (rows, columns) in zip((query, key), places.transpose(1, 2), strict=True):
            positions = (rows + row) * grid[1] + columns + column
            angles = rope_angles(positions.unsqueeze(0), grid, 16, 100.0).unsqueeze(1)
            turned.append(rotate(states, (angles.cos(), angles.sin())))
        return turned[0] @ turned[1].transpose(-1, -2)

    torch.testing.assert_close(scores(5, 3), scores(0, 0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores(0, 0), query @ key.transpose(-1, -2), atol=0.1)
    origin = rope_angles(torch.zeros(1, 12, dtype=torch.int64), grid, 16, 100.0).unsqueeze(1)
    assert torch.equal(rotate(query, (origin.cos(), origin.sin())), query)


def test_each_half_of_a_head_belongs_to_one_axis():
    angles = rope_angles(torch.tensor([[0, 1, 7]]), (3, 7), 8, 100.0)[0]
    frequencies, still = torch.tensor([1.0, 0.1, 1.0, 0.1]), torch.zeros(4)
    torch.testing.assert_close(angles[1], torch.cat([still, frequencies]))  # one column to the right
    torch.testing.assert_close(angles[2], torch.cat([frequencies, still]))  # one row down


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_tokens_is_nothing_to_the_encoder(positions):
    torch.manual_seed(0)
    encoder = CroCoEncoder(tiny(positions).backbone_config).eval()
    picture, order = torch.randn(1, 3, 32, 32), torch.randperm(16)
    visible = order[:9].unsqueeze(0)
    ordered, places = visible.sort(dim=1)
    expected = encoder(picture, ordered).last_hidden_state
    torch.testing.assert_close(encoder(picture, visible).last_hidden_state[:, places[0]], expected)
    whole = encoder(picture, order.unsqueeze(0)).last_hidden_state
    torch.testing.assert_close(whole, encoder(picture).last_hidden_state[:, order])


@pytest.mark.parametrize("positions", POSITIONS)
def test_masked_pixels_reach_nothing_and_all_of_view_2_does(positions):
    model, pixel_values = small_model(positions=positions), views(3).requires_grad_()
    output = model(pixel_values)
    # Of the prediction, not of the loss, whose target the masked pixels are.
    output.logits.square().sum().backward()
    reached = pixel_values.grad.abs()
    assert (reached[:, 1] > 0).all()
    patches = reached[:, 0].unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).sum(dim=(1, 3, 5))  # (3, 4, 4)
    assert torch.equal(patches.flatten(1) > 0, ~output.mask)


def test_the_decoder_adds_positions_to_both_views():
    model, seen = small_model(mask_ratio=0.0), {}
    layer = model.decoder.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: seen.update(states=inputs[0], memory=inputs[1]))
    tokens = torch.randn(2, 16, 32)
    model.decoder(tokens, None, tokens, (4, 4))
    expected = model.decoder.embedding(tokens) + sincos_positions_2d(16, (4, 4))
    torch.testing.assert_close(seen["states"], expected)
    torch.testing.assert_close(seen["memory"], expected)


def test_view_2_comes_to_every_block_unchanged():
    model, memories = small_model(decoder_num_hidden_layers=3), []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: memories.append(inputs[1]))
    model(views(2))
    assert len(memories) == 3 and all(memory is memories[0] for memory in memories)


def test_the_loss_does_not_see_brightness_and_contrast_of_a_target_patch():
    model, pixel_values = small_model(), views(2)
    output = model(pixel_values)
    row, column = (8 * place for place in divmod(output.mask[0].nonzero()[0].item(), 4))
    changed = pixel_values.clone()
    changed[0, 0, :, row : row + 8, column : column + 8] *= 3.0
    changed[0, 0, :, row : row + 8, column : column + 8] += 0.7
    torch.testing.assert_close(model(changed, output.mask).loss, output.loss, rtol=1e-4, atol=0)
    plain = small_model(norm_pix_loss=False)
    assert plain(changed, output.mask).loss > 1.05 * plain(pixel_values, output.mask).loss


def test_biases_and_norms_alone_do_not_decay():
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.05)
    without = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert without == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert "decoder.mask_token" not in without


def test_initialisation_has_the_references_bounds():
    model = small_model(decoder_hidden_size=64, decoder_intermediate_size=256)
    block = model.decoder.layers[0]
    stack = (6 / (4 * 64)) ** 0.5  # of a (3 * 64, 64) matrix
    for weight, bound in (
        (block.self_attention.q_proj.weight, stack),
        (block.cross_attention.q_proj.weight, (6 / (2 * 64)) ** 0.5),
        (block.feed_forward[0].weight, (6 / (64 + 256)) ** 0.5),
        (model.backbone.layers[0].attention.v_proj.weight, (6 / (4 * 32)) ** 0.5),
        (model.backbone.embeddings.patch_embeddings.weight, (6 / (3 * 8 * 8 + 32)) ** 0.5),
    ):
        assert 0.97 * bound < weight.abs().max() <= bound
    assert block.self_attention.q_proj.bias.abs().max() == 0
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)


# --- views and heads ---


def test_each_picture_of_a_scene_is_cropped_and_recoloured_by_itself():
    settings = CroCoConfig().processor_settings()
    generator = torch.Generator().manual_seed(0)
    scenes = [list(torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8, generator=generator)) for _ in range(4)]
    batch = CropPairImageProcessor(**settings)(scenes, training=True, seed=0, return_boxes=True)
    assert batch["pixel_values"].shape == (4, 2, 3, 224, 224)
    assert batch["bool_masked_pos"].sum(dim=1).unique().tolist() == [176]
    assert (batch["boxes"][..., 2:] == 224).all(), "a crop of fixed size, nothing resized"
    assert not batch["flipped"].any()
    assert (batch["boxes"][:, 0] != batch["boxes"][:, 1]).any(dim=1).all()
    plain = CropPairImageProcessor(**settings | {"photometric": None})(scenes, training=True, seed=0)
    means = (batch["pixel_values"] - plain["pixel_values"]).mean(dim=(2, 3, 4))  # (4, 2)
    assert means.abs().min() > 1e-3 and (means[:, 0] - means[:, 1]).abs().min() > 1e-3


def test_scenes_are_the_pictures_of_a_row_or_one_picture():
    pictures = np.zeros((6, 32, 32), np.uint8)
    processor = CropPairImageProcessor(**tiny().processor_settings())
    for per_row in (1, 2):
        source = ArraySource("scenes", pictures, pictures_per_row=per_row)
        data = ResidentImageDataset(source, processor, sets=make_sets("scene", source))
        assert len(data) == 6 // per_row
        batch = data.__getitems__([(0, 0), (0, 2)])
        assert batch["pixels"].shape == (2, 2, 3, 32, 32)
    with pytest.raises(ValueError, match="frame_gap"):
        make_sets("scene", source, frame_gap=(1, 2))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", [CroCoForPreTraining, CroCoForDepthEstimation, CroCoForBinocularPrediction])
def test_pictures_of_other_sizes_work(kind, positions):
    model, pixel_values = small_model(kind, positions), torch.randn(2, 2, 3, 24, 40)
    output = model(pixel_values[:, 0] if kind is CroCoForDepthEstimation else pixel_values)
    if kind is CroCoForPreTraining:
        assert output.logits.shape == (2, 15, 192)
        assert {panel.shape for panel in model.pictures(pixel_values).values()} == {(2, 3, 24, 40)}
    else:
        field = "predicted_depth" if kind is CroCoForDepthEstimation else "predicted_disparity"
        assert output[field].shape == (2, 24, 40)


@pytest.mark.parametrize("kind", [CroCoForDepthEstimation, CroCoForBinocularPrediction])
def test_heads_start_from_a_pretrained_model(kind, tmp_path):
    pretrained = small_model(seed=1)
    pretrained.save_pretrained(tmp_path)
    model, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"head"} and not report["unexpected_keys"]
    weights = pretrained.state_dict()
    for name, value in model.state_dict().items():
        assert value.isfinite().all() if name.startswith("head.") else torch.equal(value, weights[name]), name


@pytest.mark.parametrize(("task", "shape"), [("stereo", (2, 32, 48)), ("flow", (2, 2, 32, 48))])
def test_binocular_heads_learn_and_draw(task, shape):
    model = small_model(CroCoForBinocularPrediction, binocular_task=task).train()
    pixel_values = torch.randn(2, 2, 3, 32, 48)
    output = model(pixel_values, labels=3 * torch.rand(shape))
    output.loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(name.startswith("head.fusion.layers.0.residual_layer1") for name in without), "it has nothing to add to"
    assert list(output.losses) == [f"laplacian_{task}"]
    assert {panel.shape for panel in model.eval().pictures(pixel_values).values()} == {(2, 3, 32, 48)}
    with pytest.raises(ValueError, match=r"`labels` has shape \(2, 5, 5\)"):
        model(pixel_values, labels=torch.rand(2, 5, 5))


@pytest.mark.parametrize("mask_zero", [True, False])
def test_unknown_labels_carry_no_loss(mask_zero):
    model = small_model(CroCoForDepthEstimation, mask_zero_labels=mask_zero)
    pictures, labels = torch.randn(2, 3, 32, 32), 1 + torch.rand(2, 32, 32)
    labels[0, :4] = 0.0
    labels[1, 5:] = torch.nan
    output = model(pictures, labels=labels)
    known = labels.isfinite() & ((labels > 0) | (not mask_zero))
    torch.testing.assert_close(output.loss, (output.predicted_depth - labels)[known].abs().mean())
    assert model(pictures, labels=torch.full_like(labels, torch.inf)).loss == 0


def test_tiles_cover_a_side_evenly_and_overlap_enough():
    starts = tile_starts(100, 32, 0.5)
    assert starts[0] == 0 and starts[-1] == 68 and max(b - a for a, b in pairwise(starts)) <= 16
    assert tile_starts(32, 32, 0.9) == [0]
    with pytest.raises(ValueError, match="overlap is 1"):
        small_model(CroCoForBinocularPrediction).predict_tiled(views(1), overlap=1.0)


def test_one_tile_is_the_prediction_itself():
    model, pixel_values = small_model(CroCoForBinocularPrediction, binocular_task="flow"), views(2)
    tiled, whole = model.predict_tiled(pixel_values), model(pixel_values)
    torch.testing.assert_close(tiled.predicted_flow, whole.predicted_flow)
    torch.testing.assert_close(tiled.uncertainty, whole.uncertainty)


def test_exported_encoders_classify(tmp_path):
    model = small_model()
    model.backbone.save_pretrained(tmp_path)
    classifier = CroCoForImageClassification.from_pretrained(tmp_path, num_labels=3).eval()
    pictures = torch.randn(4, 3, 32, 32)
    tokens = model.backbone(pictures).last_hidden_state
    output = classifier(pictures, labels=torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(output.logits, classifier.classifier(tokens.mean(dim=1)))
    output.loss.backward()
    assert classifier.encoder.layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_wrong_settings_are_named():
    encoder = tiny("rope").backbone_config
    with pytest.raises(ValueError, match="position_embedding_type is 'learned'"):
        CroCoEncoderConfig(position_embedding_type="learned")
    with pytest.raises(ValueError, match=r"hidden_size=30 must be a multiple"):
        CroCoEncoderConfig(hidden_size=30, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"decoder_hidden_size=12 is no multiple"):
        CroCoConfig(backbone_config=encoder, decoder_hidden_size=12, decoder_num_attention_heads=2)
    for settings in ({"binocular_task": "depth"}, {"dense_loss": "l2"}, {"head_layers": [1, 2]}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            CroCoConfig(**settings)
    with pytest.raises(ValueError, match="the blocks are 0 to 2"):
        CroCoForBinocularPrediction(tiny(head_layers=[0, 1, 2, 3]))


# --- learning ---


def textures(count: int, shifts: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of crops, 5 x 5 patches of 4 pixels, out of textures of 5 x 8 patches; and by how many patches the second
    one stands to the right of the first, one of `shifts`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 10, 16, generator=generator)
    whole = torch.nn.functional.interpolate(coarse, scale_factor=2.0, mode="bilinear")  # (count, 1, 20, 32)
    shift = torch.tensor(shifts)[torch.randint(len(shifts), (count,), generator=generator)]
    low, high = (-shift).clamp(min=0), 4 - shift.clamp(min=0)
    first = low + (torch.rand(count, generator=generator) * (high - low)).long()
    columns = 4 * torch.stack([first, first + shift], dim=1)[..., None] + torch.arange(20)  # (count, 2, 20)
    columns = columns[:, :, None, None].expand(-1, -1, 1, 20, -1)
    return whole.unsqueeze(1).expand(-1, 2, -1, -1, -1).gather(-1, columns), shift


def completion_errors(model, pairs: torch.Tensor) -> tuple[float, float]:
    """The loss with the true second view, and with another pair's."""
    others = torch.stack([pairs[:, 0], pairs[:, 1].roll(1, dims=0)], dim=1)
    with torch.no_grad():
        output = model(pairs)
        return output.loss.item(), model(others, output.mask).loss.item()


def attention_hits(model, pairs: torch.Tensor, shift: torch.Tensor) -> float:
    """How often a masked patch that view 2 shows attends most, in the last block, to where it is shown."""
    weights = []
    attention = model.decoder.layers[-1].cross_attention
    hook = attention.register_forward_hook(lambda _, inputs, output: weights.append(output[1]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        mask = model(pairs).mask
    model.set_attn_implementation("sdpa")
    hook.remove()
    column = torch.arange(25) % 5 - shift.unsqueeze(1)  # (pairs, units), in view 2
    shown = (column >= 0) & (column < 5) & mask
    target = torch.arange(25) - shift.unsqueeze(1)
    return (weights[0].mean(dim=1).argmax(dim=-1) == target)[shown].float().mean().item()


def trained(shifts: list[int], steps: int, batch: int = 16) -> list[tuple[float, float, float]]:
    """Errors with the true and with another second view, and hits, on new pairs: before training and after each
    half of it."""
    torch.manual_seed(0)
    form = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = CroCoEncoderConfig(image_size=20, patch_size=4, num_channels=1, position_embedding_type="rope", **form)
    decoder = {f"decoder_{name}": value for name, value in form.items()}
    model = CroCoForPreTraining(CroCoConfig(backbone_config=encoder, mask_ratio=0.75, norm_pix_loss=False, **decoder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    pairs, _ = textures(2048, shifts, seed=1)
    new, shift = textures(128, shifts, seed=2)
    measured = []
    for step in range(steps + 1):
        if step % (steps // 2) == 0:
            model.eval()
            measured.append((*completion_errors(model, new), attention_hits(model, new, shift)))
        model.train()(pairs[torch.randint(len(pairs), (batch,))]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return measured


def test_the_second_view_completes_the_first_and_attention_finds_the_place():
    """Where the second view always stands one patch to the right."""
    start, middle, end = trained([1], steps=80)
    gaps = [other - true for true, other, _ in (start, middle, end)]
    assert gaps[0] < gaps[1] < gaps[2], "what the true second view is worth grows"
    assert abs(gaps[0]) < 0.05 and end[0] < 0.5 * end[1]
    assert start[2] < 0.2 and end[2] > 0.9, "chance is 1 in 25"


@pytest.mark.slow
def test_the_model_finds_out_how_the_views_stand_to_each_other():
    """Where the second view stands up to two patches to either side, differently in each pair."""
    start, middle, end = trained([-2, -1, 0, 1, 2], steps=800, batch=32)
    gaps = [other - true for true, other, _ in (start, middle, end)]
    assert abs(gaps[0]) < 0.03 < gaps[1] < gaps[2] and gaps[2] > 0.08
    assert start[2] < 0.1 and end[2] > 0.25, "chance is 1 in 25"
