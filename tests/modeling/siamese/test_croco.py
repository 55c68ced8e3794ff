"""CroCo against its reference, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch

from hf_masked import (
    CroCoConfig,
    CroCoEncoderConfig,
    CroCoForBinocularPrediction,
    CroCoForDepthEstimation,
    CroCoForPreTraining,
)
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d
from hf_masked.modeling.siamese.croco import convert_official_weights, tiny_config
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
    found = (
        output.predicted_flow
        if name == "flow"
        else output[{"stereo": "predicted_disparity"}.get(name, "predicted_depth")]
    )
    found = found if name == "flow" else found.unsqueeze(1)
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
    settings = {
        "binocular_task": task,
        "dense_loss": kind,
        "max_label_norm": None if limit == "None" else float(limit),
    }
    model = small_model(CroCoForBinocularPrediction, **settings)
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
