"""CAPI against its reference, and every check of its spec (section 11).

That two processes make the same step as one (check 2) is tested for all methods in `tests/conformance`.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, get_cosine_schedule_with_warmup

from hf_masked import (
    CAPIConfig,
    CAPIEncoder,
    CAPIEncoderConfig,
    CAPIForImageClassification,
    CAPIForPreTraining,
    CAPIModel,
)
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_latent.capi import (
    PrototypeHead,
    capi_momentum,
    convert_official_weights,
    official_config,
    sinkhorn,
    soft_cross_entropy,
    tiny_config,
)
from hf_masked.modeling.masked_latent.capi_encoder import rope_angles, rotary_parts, token_coordinates
from hf_masked.modeling.parts.rotary import rotate
from hf_masked.modeling.registry import get_variant
from hf_masked.processing.masks import inverse_block_mask
from hf_masked.randomness import torch_draw
from hf_masked.training.optimization import parameter_groups
from tests.modeling.masked_image.short_runs import fashion
from tests.parity.fill import filled, filled_pixels

REFERENCE = json.loads((Path(__file__).parents[2] / "parity" / "capi.json").read_text())
PARITY = REFERENCE["pretraining"]


def config_of(run: str, **arguments) -> CAPIConfig:
    """Our config for the arguments of the reference's constructors."""
    reference = PARITY[run]["config"]
    return CAPIConfig(
        backbone_config=CAPIEncoderConfig(
            hidden_size=reference["embed"],
            num_hidden_layers=reference["enc"],
            num_attention_heads=reference["heads"],
            intermediate_size=4 * reference["embed"],
            image_size=reference["size"],
            patch_size=reference["patch"],
            num_register_tokens=reference["registers"],
        ),
        predictor_hidden_size=reference["embed"],
        predictor_num_hidden_layers=reference["dec"],
        predictor_num_attention_heads=reference["heads"],
        predictor_intermediate_size=4 * reference["embed"],
        num_clusters=reference["clusters"],
        positionwise_sinkhorn=reference["positionwise"],
        **arguments,
    )


def official_weights(run: str) -> dict[str, torch.Tensor]:
    """A training checkpoint of the reference, filled; the frequencies are the reference's formula."""
    shapes = PARITY[run]["parameters"]
    weights = filled({name: shape for name, shape in shapes.items() if not name.startswith("teacher.backbone.")})
    head = PARITY[run]["config"]["embed"] // PARITY[run]["config"]["heads"]
    frequencies = [7 * (7 / 7e-4) ** -(i / max(head // 4 - 1, 1)) * 2 * math.pi for i in range(head // 4)] * 2
    frequencies = torch.tensor([frequencies + [0.0] * (head // 2), [0.0] * (head // 2) + frequencies])
    for name in [name for name in weights if name.endswith("residual1.fn.q_proj.weight")]:
        weights[name.replace("q_proj.weight", "rope.freqs")] = frequencies
    teacher = {
        name.replace("student_ema.", "teacher."): weights[name] for name in weights if name.startswith("student_ema.b")
    }
    return weights | teacher


def converted_model(run: str) -> CAPIForPreTraining:
    model = CAPIForPreTraining(config_of(run)).eval()
    model.load_state_dict(convert_official_weights(official_weights(run), model.config))
    return model


def inputs_of(run: str) -> dict[str, torch.Tensor]:
    stored = PARITY[run]
    mask = torch.tensor(stored["mask"], dtype=torch.bool)
    predicted = torch.zeros_like(mask).scatter(1, torch.tensor(stored["predicted_ids"]), True)
    side = stored["config"]["size"]
    pixel_values = filled_pixels((stored["config"]["batch"], 3, side, side), f"{run}.pixels")
    return {"pixel_values": pixel_values, "bool_masked_pos": mask, "bool_predicted_pos": predicted}


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.as_tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


def rectangles(batch: int, config: CAPIConfig, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.num_channels, 32, 32, generator=generator)


@pytest.mark.parametrize("run", PARITY)
def test_losses_and_outputs_are_the_references(run):
    stored, model = PARITY[run], converted_model(run)
    output = model(**inputs_of(run))
    assert output.predicted_ids.tolist() == stored["predicted_ids"]
    close(output.losses["prediction"], stored["prediction"])
    close(output.losses["clustering"], stored["clustering"])
    close(output.targets, stored["targets"])
    close(output.logits, stored["logits"])
    close(output.last_hidden_state, stored["latent"])


@pytest.mark.parametrize("run", PARITY)
def test_gradients_are_the_references(run):
    stored, model = PARITY[run], converted_model(run)
    model(**inputs_of(run)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    official = {name: torch.full(shape, 7.0) for name, shape in stored["parameters"].items()}
    seen = set()
    for name, norm in stored["gradient_norms"].items():
        # Marked as the only parameter of its kind, it tells which of ours it becomes.
        marked = {other: value.neg() if other == name else value for other, value in official.items()}
        (ours,) = (
            converted
            for converted, value in convert_official_weights(marked, model.config).items()
            if (value < 0).all() and not converted.startswith("twin.")
        )
        seen.add(ours)
        assert gradients[ours].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-8), name
    assert seen == gradients.keys()


@pytest.mark.parametrize("run", PARITY)
def test_released_files_make_the_model_of_features(run, tmp_path):
    training = official_weights(run)
    released = {
        name.removeprefix("student."): value for name, value in training.items() if name.startswith("student.")
    }
    torch.save(released, tmp_path / "capi.pth")
    model = convert(get_variant("capi"), tmp_path / "capi.pth")
    assert type(model) is CAPIModel
    outputs = model.eval()(inputs_of(run)["pixel_values"])
    close(outputs.pooler_output, PARITY[run]["pooled"])
    close(outputs.feature_map.permute(0, 2, 3, 1)[:1], PARITY[run]["feature_map"])


def test_checkpoints_of_training_make_the_whole_model(tmp_path):
    torch.save({"model": official_weights("positionwise"), "iteration": 3}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no dictionary"):
        torch.save({"model": 3}, tmp_path / "wrong.pth")
        convert(get_variant("capi"), tmp_path / "wrong.pth")
    model = convert(get_variant("capi"), tmp_path / "model.pth")
    assert type(model) is CAPIForPreTraining
    ours, theirs = model.config, config_of("positionwise")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_register_tokens"):
        assert getattr(ours.backbone_config, name) == getattr(theirs.backbone_config, name), name
    assert ours.num_clusters == theirs.num_clusters and ours.predictor_num_hidden_layers == 2
    assert not torch.equal(
        model.twin.backbone.layers[0].attention.q_proj.weight, model.backbone.layers[0].attention.q_proj.weight
    )


def test_conversion_is_strict(tmp_path):
    weights = official_weights("flattened")
    with pytest.raises(ValueError, match="rope_max_frequency"):
        convert_official_weights(weights, CAPIConfig(backbone_config=CAPIEncoderConfig(rope_max_frequency=3.0)))
    torch.save(weights | {"student.backbone.cls_token": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="left over: cls_token"):
        convert(get_variant("capi"), tmp_path / "more.pth")
    with pytest.raises(ValueError, match="no backbone of CAPI"):
        official_config({"cls_token": torch.zeros(1)})


def test_1_counts_are_the_papers():
    config = CAPIConfig()
    drawn = inverse_block_mask(torch_draw(64), (16, 16), config.mask_ratio)
    assert drawn.sum(dim=1).unique().tolist() == [166]
    model = CAPIForPreTraining(
        CAPIConfig(**tiny_config().to_dict() | {"mask_ratio": 166 / 256, "prediction_ratio": 8 / 256})
    )
    output = model(torch.randn(2, 3, 128, 128), return_loss=False)
    assert output.mask.sum(dim=1).tolist() == [166, 166] and output.predicted_ids.shape == (2, 8)
    assert output.last_hidden_state.shape[1] == 4 + 90
    assert output.mask.gather(1, output.predicted_ids).all()


def test_1_the_visible_patches_are_one_rectangle_on_the_torus_up_to_truncation():
    torch.manual_seed(0)
    visible = ~inverse_block_mask(torch_draw(300), (16, 16), 166 / 256).view(-1, 16, 16)
    heights, widths = visible.any(dim=2).sum(dim=1), visible.any(dim=1).sum(dim=1)
    # A rectangle of the rounded-up sides, less some units of its last rows.
    spare = heights * widths - 90
    assert (spare >= 0).all() and (spare < 2 * widths).all()
    aspects = heights / widths
    assert aspects.min() < 0.7 and aspects.max() > 1.4 and aspects.min() > 0.4 and aspects.max() < 2.5
    for picture, height, width in zip(visible, heights, widths, strict=True):
        for axis, side in ((1, height), (0, width)):
            line = picture.any(dim=axis)
            starts = (line & ~line.roll(1)).sum()
            assert starts == (0 if side == 16 else 1), "what is visible falls apart on the torus"


def test_1_shifts_cover_the_grid_and_without_them_the_edges_are_masked_more():
    torch.manual_seed(0)
    rolled, still = (
        (~inverse_block_mask(torch_draw(4000), (16, 16), 166 / 256, roll=roll)).float().mean(dim=0).view(16, 16)
        for roll in (True, False)
    )
    assert (rolled - 90 / 256).abs().max() < 0.04
    assert still[0, 0] < 0.1 and still[8, 8] > 0.8


@pytest.mark.parametrize("grid", [(32, 4), (3, 20), (2, 2), (1, 7)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.65, 0.95])
def test_inverse_blocks_fit_any_grid(grid, ratio):
    mask = inverse_block_mask(torch_draw(20), grid, ratio)
    units = grid[0] * grid[1]
    assert (~mask).sum(dim=1).unique().tolist() == [int(units * (1 - ratio))]


def test_2_sinkhorn_rows_sum_to_one_and_clusters_become_alike():
    torch.manual_seed(0)
    scores = torch.randn(60, 5, 8) / 0.3
    few, many = sinkhorn(scores, 3), sinkhorn(scores, 100)
    for assignments in (few, many):
        torch.testing.assert_close(assignments.sum(dim=-1), torch.ones(60, 5))
    expected = torch.full((5, 8), 60 / 8)
    torch.testing.assert_close(many.sum(dim=0), expected, rtol=1e-3, atol=0)
    assert (few.sum(dim=0) - expected).abs().max() > (many.sum(dim=0) - expected).abs().max()


def test_2_balance_is_per_position_or_over_everything():
    model = CAPIForPreTraining(tiny_config())
    torch.manual_seed(0)
    # At each position all pictures prefer one cluster of its own.
    scores = torch.randn(40, 4, 16) * 0.1
    for position in range(4):
        scores[:, position, position] += 2.0
    positionwise = model.assign(scores)
    model.config.positionwise_sinkhorn = False
    together = model.assign(scores)
    first = torch.arange(4)
    assert positionwise.mean(dim=0)[first, first].max() < 0.1, "a cluster that stands for a position survived"
    assert together.mean(dim=0)[first, first].min() > 0.15
    # With a single picture nothing is left of the scores.
    torch.testing.assert_close(sinkhorn(scores[:1] / 0.06, 3), torch.full((1, 4, 16), 1 / 16))


def test_3_predicted_patches_do_not_see_each_other():
    model = CAPIForPreTraining(tiny_config()).eval()
    pixel_values = rectangles(2, model.config)
    mask = model.draw_mask(pixel_values, (4, 4))
    everything = model(pixel_values, mask, bool_predicted_pos=mask)
    assert everything.logits.shape[1] == mask.sum(dim=1)[0] > 3
    fewer = mask.scatter(1, everything.predicted_ids[:, :1], False)
    part = model(pixel_values, mask, bool_predicted_pos=fewer)
    torch.testing.assert_close(part.logits, everything.logits[:, 1:])
    assert not torch.allclose(part.logits[:, 0], part.logits[:, 1]), "predictions do not depend on the position"


def test_4_student_ignores_masked_pixels_and_the_teacher_sees_them():
    model = CAPIForPreTraining(tiny_config()).eval()
    pixel_values = rectangles(2, model.config)
    mask = model.draw_mask(pixel_values, (4, 4))
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    changed = torch.where(hidden, pixel_values + 3.0, pixel_values)
    before, after = model(pixel_values, mask), model(changed, mask)
    assert torch.equal(before.logits, after.logits)
    assert not torch.allclose(before.targets, after.targets)


def test_5_each_loss_has_its_own_weights():
    model = CAPIForPreTraining(tiny_config()).train()
    pixel_values = rectangles(4, model.config)
    output = model(pixel_values)
    scores = model.cluster_scores(pixel_values)
    losses = {
        "clustering": soft_cross_entropy(scores, model.assign(scores), 0.12),
        "prediction": soft_cross_entropy(output.logits, output.targets, 0.12),
    }
    touched = {}
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        touched[name] = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched["clustering"] == {"clustering.weight", "clustering.bias"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert touched["prediction"] == trained - touched["clustering"]
    assert not any(name.startswith("twin.") for name in trained)


def turned(coordinates: list, states: torch.Tensor, rope: str) -> torch.Tensor:
    """(heads, width) turned as at (row, column)."""
    angles = rope_angles(torch.tensor([[coordinates]]), states.shape[-1], 7.0, 7e-4)
    return rotate(states[None, :, None], (angles.cos(), angles.sin()), rotary_parts(rope))[0, :, 0]


def test_6_axial_rope_is_a_rotation_that_knows_differences_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 16)
    torch.testing.assert_close(turned([0.3, 0.8], query, "axial").norm(dim=1), query.norm(dim=1))
    here = (turned([0.3, 0.8], query, "axial") * turned([0.1, 0.2], key, "axial")).sum()
    there = (turned([0.6, 0.65], query, "axial") * turned([0.4, 0.05], key, "axial")).sum()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_6_reference_rope_is_the_formula_of_the_code_and_no_rotation():
    torch.manual_seed(0)
    states, (row, column) = torch.randn(1, 16), (0.3, 0.8)
    frequencies = 7 * 1e4 ** (-torch.arange(4) / 3)
    a, b = (2 * math.pi * axis * torch.cat([frequencies, frequencies]) for axis in (row, column))
    first, second = states[:, :8], states[:, 8:]
    expected = torch.cat([first * a.cos() - second * a.sin(), second * b.cos() + first * b.sin()], dim=1)
    found = turned([row, column], states, "reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert abs(found.norm() - states.norm()) > 0.01
    query, key = torch.randn(2, 1, 16)
    here = (turned([0.3, 0.8], query, "reference") * turned([0.1, 0.2], key, "reference")).sum()
    there = (turned([0.6, 0.65], query, "reference") * turned([0.4, 0.05], key, "reference")).sum()
    assert abs(here - there) > 0.01


def test_registers_stand_around_what_is_visible():
    visible = torch.tensor([[5, 6, 9, 10, 13, 14]])  # rows 1 to 3, columns 1 to 2 of 4 x 4
    coordinates = token_coordinates((4, 4), 8, visible)[0]
    third = 1 / 3
    border = [[third, third], [2 * third, third], [1, third], [1, 1.5 * third]]
    border += [[1, 2 * third], [2 * third, 2 * third], [third, 2 * third], [third, 1.5 * third]]
    torch.testing.assert_close(coordinates[:8], torch.tensor(border))
    torch.testing.assert_close(coordinates[8], torch.tensor([third, third]))


def test_7_the_teacher_stands_still_at_first_and_momentum_follows_the_reference():
    model = CAPIForPreTraining(tiny_config())
    before = {name: value.clone() for name, value in model.twin.state_dict().items()}
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1.0)
    model.training_progress = 0.0
    model.update_twins()
    assert all(torch.equal(value, before[name]) for name, value in model.twin.state_dict().items())
    model.training_progress = 0.1
    model.update_twins()
    moved = model.twin.backbone.embeddings.register_tokens - before["backbone.embeddings.register_tokens"]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-2, atol=0)
    schedules = REFERENCE["schedules"]
    for step, expected in schedules["momentum"].items():
        # The reference reaches the base one step before the end of its warm-up.
        found = capi_momentum(0.999, schedules["warmup"] / schedules["steps"], int(step) / schedules["steps"])
        assert found == pytest.approx(expected, abs=1.1e-5), step


def test_7_learning_rate_of_the_recipe_follows_the_reference():
    schedules = REFERENCE["schedules"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, schedules["warmup"], schedules["steps"], num_cycles=0.4)
    for step, expected in schedules["learning_rate"].items():
        assert schedule.lr_lambdas[0](int(step)) == pytest.approx(expected, abs=0.011), step


def test_optimizer_groups_are_the_references():
    model = converted_model("positionwise")
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1e-3)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    official = {name: torch.zeros(shape) for name, shape in PARITY["positionwise"]["parameters"].items()}
    own = dict(model.named_parameters())
    for name, (rate, decay) in REFERENCE["multipliers"].items():
        marked = official | {name: torch.ones_like(official[name])}
        converted = convert_official_weights(marked, model.config)
        (ours,) = (n for n, value in converted.items() if value.max() > 0 and not n.startswith("twin."))
        assert found[id(own[ours])] == pytest.approx((1e-3 * rate, 0.1 * decay)), name
    for name in ("clustering.weight", "clustering.bias"):
        assert found[id(own[name])] == pytest.approx((5e-4, 0.01))


def test_8_a_student_without_opinion_has_the_loss_ln_k():
    torch.manual_seed(0)
    targets = torch.randn(3, 5, 16).softmax(dim=-1)
    assert soft_cross_entropy(torch.zeros(3, 5, 16), targets, 0.12).item() == pytest.approx(math.log(16), rel=1e-6)
    model = CAPIForPreTraining(tiny_config())
    torch.nn.init.zeros_(model.head.lengths)
    assert model(rectangles(4, model.config)).losses["prediction"].item() == pytest.approx(math.log(16), rel=1e-6)


def test_prototypes_have_learned_lengths():
    head = PrototypeHead(8, 4)
    torch.nn.init.normal_(head.directions)
    with torch.no_grad():
        head.lengths.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    aligned = head(5 * head.directions.unsqueeze(0)).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(aligned, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))


def test_initial_weights_are_the_references():
    torch.manual_seed(0)
    settings = tiny_config().to_dict() | {"num_clusters": 500}
    model = CAPIForPreTraining(CAPIConfig(**settings))
    assert model.clustering.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert model.clustering.bias.abs().max() == 0
    assert (model.head.lengths == 1).all()
    assert model.head.directions.std().item() == pytest.approx(0.02, rel=0.1)
    kernel = model.backbone.embeddings.patch_embeddings.weight.flatten(1)
    assert kernel.abs().max().item() == pytest.approx(math.sqrt(6 / sum(kernel.shape)), rel=0.01)
    for token in (model.backbone.embeddings.register_tokens, model.predictor.mask_token):
        assert 0.01 < token.std().item() < 0.03


def test_depth_is_stochastic_over_a_part_of_the_batch_in_training_only():
    config = CAPIEncoderConfig(**tiny_config().backbone_config.to_dict() | {"drop_path_rate": 0.5})
    layer = CAPIEncoder(config).layers[0]
    hidden_states = torch.randn(8, 5, 32)
    rotation = (torch.ones(8, 1, 5, 16), torch.zeros(8, 1, 5, 16))
    layer.eval()
    whole = layer._add(hidden_states, layer._feed_forward) - hidden_states
    layer.train()
    part = layer._add(hidden_states, layer._feed_forward) - hidden_states
    kept = part.flatten(1).abs().amax(dim=1) > 0
    assert kept.sum() == 4
    torch.testing.assert_close(part[kept], 2 * whole[kept], rtol=1e-4, atol=1e-5)
    assert layer(hidden_states, rotation).shape == hidden_states.shape


def test_any_resolution_works_and_a_feature_map_comes_out():
    model = CAPIModel(tiny_config()).eval()
    outputs = model(torch.randn(2, 3, 48, 64))
    assert outputs.feature_map.shape == (2, 32, 6, 8) and outputs.pooler_output.shape == (2, 16)
    assert outputs.last_hidden_state.shape == (2, 4 + 48, 32)
    row_major = outputs.last_hidden_state[:, 4:].unflatten(1, (6, 8)).permute(0, 3, 1, 2)
    torch.testing.assert_close(outputs.feature_map, row_major)


def test_exported_encoder_becomes_a_classifier_that_learns(tmp_path):
    encoder = CAPIEncoder(tiny_config().backbone_config)
    encoder.save_pretrained(tmp_path)
    model, report = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert type(model) is CAPIForImageClassification and not report["unexpected_keys"]
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"pooler", "classifier"}
    assert torch.equal(model.encoder.embeddings.register_tokens, encoder.embeddings.register_tokens)
    pixel_values, labels = rectangles(6, tiny_config()), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = model(pixel_values, labels=labels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(math.log(3), rel=0.1) and losses[-1] < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_ratio": 0.9}, "prediction_ratio is 0.9"),
        ({"predictor_num_attention_heads": 3}, "predictor_hidden_size=16 is no multiple"),
        ({"student_temperature": 0.0}, "student_temperature is 0.0"),
        ({"num_clusters": 0}, "num_clusters is 0"),
        ({"momentum_base": 1.5}, "momentum_base is 1.5"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CAPIConfig(**tiny_config().to_dict() | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_register_tokens": 5}, "num_register_tokens is 5"),
        ({"rope": "spiral"}, "rope is 'spiral'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"hidden_size": 30}, "hidden_size=30 is no multiple"),
        ({"patch_size": 7}, "cannot be cut into patches of 7"),
    ],
)
def test_wrong_settings_of_the_encoder_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CAPIEncoderConfig(**tiny_config().backbone_config.to_dict() | arguments)


def test_pictures_show_the_clusters():
    model = CAPIForPreTraining(tiny_config()).eval()
    pixel_values = rectangles(2, model.config)
    mask = model.draw_mask(pixel_values, (4, 4))
    panels = model.pictures(pixel_values, mask)
    output = model(pixel_values, mask, bool_predicted_pos=mask)
    teacher, predicted = (panels[name][:, :, ::8, ::8].flatten(2) for name in list(panels)[2:])
    same = output.clusters[0][:, None] == output.clusters[0]
    assert torch.equal((teacher[0].T[:, None] == teacher[0].T).all(dim=-1), same)
    first = output.predicted_ids[0, 0]
    agrees = output.logits[0, 0].argmax() == output.clusters[0, first]
    assert bool((predicted[0, :, first] == teacher[0, :, first]).all()) == bool(agrees)
    assert predicted[0][:, ~mask[0]].abs().max() == 0


def fashion_model(**arguments) -> CAPIForPreTraining:
    backbone_config = CAPIEncoderConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=4,
        num_channels=1,
        num_register_tokens=4,
        drop_path_rate=0.0,
    )
    torch.manual_seed(0)
    return CAPIForPreTraining(
        CAPIConfig(
            backbone_config=backbone_config,
            prediction_ratio=0.15,
            predictor_hidden_size=64,
            predictor_num_hidden_layers=2,
            predictor_num_attention_heads=4,
            predictor_intermediate_size=128,
            num_clusters=64,
            momentum_base=0.99,
            clustering_learning_rate_factor=5.0,  # in so few steps the paper's would leave the clusters as they are
            **arguments,
        )
    )


def trained_on_fashion(pictures: torch.Tensor, steps: int = 150, batch: int = 128, **arguments) -> CAPIForPreTraining:
    model = fashion_model(**arguments).train()
    generator = torch.Generator().manual_seed(0)
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=2e-3)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps, num_cycles=0.4)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        model(pictures[chosen], generator=generator).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        model.update_twins()
        model.training_progress = (step + 1) / steps
    return model.eval()


def position_information(clusters: torch.Tensor, num_clusters: int = 64) -> float:
    """Mutual information, in nats, of a patch's position and its cluster: (batch, units)."""
    counts = torch.nn.functional.one_hot(clusters, num_clusters).sum(dim=0).double()  # (units, clusters)
    joint = counts / counts.sum()
    independent = joint.sum(dim=0, keepdim=True) * joint.sum(dim=1, keepdim=True)
    return float(torch.where(joint > 0, joint * (joint / independent).log(), 0.0).sum())


@pytest.mark.slow
def test_it_learns_on_fashion_mnist():
    """The spec's experiment."""
    train, test = fashion(3000, 1000)
    model = trained_on_fashion(train[0])
    with torch.no_grad():
        output = model(test[0][:256])
    usage = output.clusters.flatten().bincount(minlength=64) / output.clusters.numel()
    marginal = output.targets.flatten(0, 1).mean(dim=0)
    marginal_entropy = float(-torch.xlogy(marginal, marginal).sum())
    assert output.losses["prediction"] < marginal_entropy < math.log(64) + 1e-4
    assert 0.05 < output.target_entropy < math.log(64) - 0.5
    assert (usage > 0).all(), "some clusters are not used"
    scores = []
    for one in (model, fashion_model().eval()):
        features = []
        with torch.no_grad():
            for pictures, labels in (train, test):
                tokens = [one.backbone(part).last_hidden_state[:, 4:].mean(dim=1) for part in pictures.split(500)]
                features += [torch.cat(tokens), labels]
        scores.append(weighted_knn(*features))
    assert scores[0] > scores[1] + 0.01
    flattened = trained_on_fashion(train[0], positionwise_sinkhorn=False)
    with torch.no_grad():
        together = flattened(test[0][:256], return_loss=False).clusters
    assert position_information(together) > position_information(output.clusters) + 0.1
