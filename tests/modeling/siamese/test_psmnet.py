"""PSMNet against its reference, and every check of its spec (section 11)."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_masked import PSMNetConfig, PSMNetFeatures, PSMNetFeaturesConfig, PSMNetForStereoMatching, PSMNetModel
from hf_masked.data import SyntheticStereo, stereo
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.parts.stereo import concat_cost_volume, soft_argmin, warp_to_left
from hf_masked.modeling.registry import get_variant
from hf_masked.modeling.siamese.psmnet import (
    PSMNetHourglass,
    convert_official_weights,
    example_inputs,
    official_config,
    tiny_config,
)
from hf_masked.processing.stereo import StereoImageProcessor
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "psmnet.json").read_text())
RUNS = PARITY["training"]


def small_config(**settings) -> PSMNetConfig:
    return PSMNetConfig(backbone_config=tiny_config().backbone_config, max_disparity=16, volume_channels=4, **settings)


def small_model(seed: int = 0, **settings) -> PSMNetForStereoMatching:
    torch.manual_seed(seed)
    return PSMNetForStereoMatching(small_config(**settings))


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the reference ---


def official_weights(run: dict) -> dict[str, torch.Tensor]:
    """Filled parameters under the reference's names, and running statistics as torch begins them."""
    weights = filled({name: tuple(shape) for name, shape in run["parameters"].items()})
    for name, tensor in list(weights.items()):
        if name.endswith(".bias"):  # of norms alone
            weights[name.replace("bias", "running_mean")] = torch.zeros_like(tensor)
            weights[name.replace("bias", "running_var")] = torch.ones_like(tensor)
    return weights


# At the 256 pixels below which the reference's largest pool fails. In float64, where gradients can be compared
# closely, it takes half a minute.
@pytest.mark.parametrize(
    ("name", "dtype", "gradient_tolerance"),
    [
        ("stackhourglass", torch.float32, 1e-2),
        pytest.param("stackhourglass", torch.float64, 1e-4, marks=pytest.mark.slow),
        pytest.param("basic", torch.float64, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_same_numbers_as_the_reference(name, dtype, gradient_tolerance):
    run = RUNS[name]
    setting, stride = run["config"], run["stride"]
    weights = official_weights(run)
    config = official_config(weights)
    assert config.aggregation == setting["model"]
    settings = config.to_dict() | {"max_disparity": setting["maxdisp"], "align_corners": setting["align_corners"]}
    config = PSMNetConfig(**{name: value for name, value in settings.items() if name != "model_type"})
    model = PSMNetForStereoMatching(config)
    model.load_state_dict(convert_official_weights(weights, config))
    model.to(dtype).train()
    batch, size = setting["batch"], (setting["height"], setting["width"])
    pixel_values = filled_pixels((batch, 2, 3, *size), f"{name}.pixels").to(dtype)
    labels = filled_pixels((batch, *size), f"{name}.labels").to(dtype)
    labels = ((labels + 2) / 4 * (setting["maxdisp"] + 8) - 4).clamp(min=0)
    output = model(pixel_values, labels)
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert output.loss.item() == pytest.approx(run["loss"], rel=1e-5)
    disparities = [*output.intermediate_disparities, output.predicted_disparity]
    for found, expected, mean in zip(disparities, run["predictions"], run["means"], strict=True):
        torch.testing.assert_close(found[:, ::stride, ::stride], torch.tensor(expected), **close)
        assert found.mean().item() == pytest.approx(mean, rel=1e-5)
    output.loss.backward()
    norms = {name: torch.tensor(norm) for name, norm in run["gradient_norms"].items()}
    expected = {
        name: norm for name, norm in convert_official_weights(norms, config).items() if "num_batches" not in name
    }
    found = {name: parameter.grad.norm().float() for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        torch.testing.assert_close(found[name], norm, rtol=gradient_tolerance, atol=1e-6, msg=name)
    buffers = convert_official_weights({name: torch.tensor(v) for name, v in run["buffers"].items()}, config)
    for name, value in buffers.items():
        if "num_batches" not in name:
            torch.testing.assert_close(dict(model.named_buffers())[name].float(), value, **close)
    with torch.no_grad():
        evaluated = model.eval()(pixel_values).predicted_disparity[:, ::stride, ::stride]
    torch.testing.assert_close(evaluated, torch.tensor(run["evaluation"]), **close)


@pytest.mark.parametrize("name", RUNS)
def test_official_files_convert(name, tmp_path):
    # As they were released: under "state_dict", of DataParallel, and from a torch that counted no batches.
    weights = {f"module.{key}": value for key, value in official_weights(RUNS[name]).items()}
    torch.save({"epoch": 10, "train_loss": 0.8, "state_dict": weights}, tmp_path / "pretrained.tar")
    model = convert(get_variant("psmnet"), tmp_path / "pretrained.tar")
    assert type(model) is PSMNetForStereoMatching and model.config.align_corners
    assert model.config.max_disparity == 192 and model.config.aggregation == RUNS[name]["config"]["model"]
    found = model.backbone.stem[0].convolution.weight
    assert torch.equal(found, weights["module.feature_extraction.firstconv.0.0.weight"])
    weights["module.dres5.0.0.weight"] = weights.pop("module.dres1.0.0.weight")
    torch.save({"state_dict": weights}, tmp_path / "broken.tar")
    with pytest.raises(ValueError, match="fits neither"):
        convert(get_variant("psmnet"), tmp_path / "broken.tar")


# --- section 11: counts ---


@pytest.mark.parametrize(("aggregation", "count"), [("stackhourglass", 5_224_768), ("basic", 3_672_896)])
def test_parameters_are_the_papers(aggregation, count):
    with torch.device("meta"):
        model = PSMNetForStereoMatching(PSMNetConfig(aggregation=aggregation))
    assert parameters(model) == count and parameters(model.backbone) == 3_339_552


# --- section 11: cost volume and soft argmin ---


def test_cost_volume_is_that_of_a_loop():
    left, right = torch.randn(2, 2, 3, 4, 7, requires_grad=True).unbind()
    volume = concat_cost_volume(left, right, 9)  # beyond the width, too
    assert volume.shape == (2, 6, 9, 4, 7)
    for plane in range(9):
        for x in range(7):
            expected = torch.cat([left[..., x], right[..., x - plane]], 1) if x >= plane else torch.zeros(2, 6, 4)
            assert torch.equal(volume[:, :, plane, :, x], expected)
    assert torch.equal(volume[:, :, 0], torch.cat([left, right], dim=1))


def test_halves_agree_at_the_disparity_of_a_shifted_map():
    right = torch.randn(1, 3, 4, 12)
    left = torch.randn(1, 3, 4, 12)
    left[..., 4:] = right[..., :-4]  # left column x is right column x - 4
    volume = concat_cost_volume(left, right, 8)
    equal = [torch.equal(volume[:, :3, plane, :, 4:], volume[:, 3:, plane, :, 4:]) for plane in range(8)]
    assert equal == [plane == 4 for plane in range(8)]


def test_soft_argmin():
    scores = torch.zeros(1, 8, 2, 3)
    torch.testing.assert_close(soft_argmin(scores), torch.full((1, 2, 3), 3.5))
    sharp = F.one_hot(torch.tensor([[[0, 3, 7]]]), 8).permute(0, 3, 1, 2).float()
    # Of scores, not of costs: the highest wins.
    torch.testing.assert_close(soft_argmin(100 * sharp), torch.tensor([[[0.0, 3.0, 7.0]]]))
    wild = soft_argmin(50 * torch.randn(2, 8, 5, 5))
    assert wild.min() >= 0 and wild.max() < 7.001  # but for rounding


def test_right_picture_moved_by_the_true_disparity_is_the_left_one():
    right = torch.rand(1, 3, 2, 16)
    disparity = torch.full((1, 2, 16), 2.5)
    expected = (right[..., :-3] + right[..., 1:-2]) / 2  # columns 3 to 15 less 2.5
    torch.testing.assert_close(warp_to_left(right, disparity)[..., 3:], expected)


# --- section 11: the hourglasses ---


def test_hourglass_keeps_the_shape_and_joins_by_addition():
    torch.manual_seed(0)
    hourglass = PSMNetHourglass(4).eval()
    volume = torch.randn(1, 4, 8, 12, 16)
    output, before, after = hourglass(volume)
    assert output.shape == volume.shape and before.shape == after.shape == (1, 8, 4, 6, 8)
    for joined in (hourglass(volume, skip=before), hourglass(volume, previous=torch.zeros_like(before))):
        torch.testing.assert_close(joined[0], output)
    assert not torch.allclose(hourglass(volume, skip=before + 1)[0], output)
    torch.testing.assert_close(
        hourglass(volume, previous=torch.ones_like(before))[1], _before_plus_one(hourglass, volume)
    )


def _before_plus_one(hourglass, volume):
    return (hourglass.keep1(hourglass.down1(volume)) + 1).relu()


def test_third_hourglass_takes_the_first_ones_skip():
    model = small_model().eval()
    calls = []
    for hourglass in model.aggregation.hourglasses:
        hourglass.register_forward_hook(lambda module, inputs, outputs: calls.append((inputs, outputs)))
    model(example_inputs(model.config, 1)["pixel_values"])
    (first, (_, before1, after1)), (second, (_, before2, after2)), (third, _) = calls
    assert first[1:] == (None, None)
    assert second[1] is before1 and second[2] is after1
    assert third[1] is before1 and third[1] is not before2 and third[2] is after2


def test_predictions_are_sums_of_the_scores_so_far():
    model = small_model().eval()
    with torch.no_grad():
        for classifier in list(model.aggregation.classifiers)[1:]:
            classifier[1].weight.zero_()
    inputs = example_inputs(model.config, 1)
    output = model(**inputs)
    for intermediate in output.intermediate_disparities:
        torch.testing.assert_close(intermediate, output.predicted_disparity)


# --- section 11: upsampling, pools, sizes ---


def test_align_corners_reaches_encoder_and_scores():
    inputs = example_inputs(tiny_config(), 2)["pixel_values"]
    found = {}
    for aligned in (True, False):
        model = small_model(align_corners=aligned).eval()
        assert model.backbone.config.align_corners is aligned
        found[aligned] = model.backbone(inputs[:, 0]).last_hidden_state, model(inputs).predicted_disparity
    assert not torch.allclose(found[True][0], found[False][0])
    scores = torch.randn(1, 1, 4, 8, 8)
    for aligned in (True, False):
        expected = F.interpolate(scores, size=(16, 32, 32), mode="trilinear", align_corners=aligned)[:, 0]
        disparity = small_model(align_corners=aligned)._disparity(scores, (32, 32))
        torch.testing.assert_close(disparity, soft_argmin(expected))
    assert small_model().config.align_corners


def test_encoders_setting_is_kept_unless_another_is_given():
    features = PSMNetFeaturesConfig(align_corners=False)
    assert not PSMNetConfig(backbone_config=features).align_corners
    assert PSMNetConfig(backbone_config=features, align_corners=True).backbone_config.align_corners


def test_pools_are_no_larger_than_the_map():
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 64, 128)  # a map of 16 x 32
    settings = tiny_config().backbone_config.to_dict() | {"pool_sizes": (64, 8)}
    model = PSMNetFeatures(PSMNetFeaturesConfig(**settings)).eval()
    pooled = []
    model.pyramid[0].register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    output = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(pooled[0], output.hidden_states[-1].mean(dim=(2, 3), keepdim=True))
    assert output.last_hidden_state.shape == (1, 4, 16, 32)


def test_other_sizes_and_disparities_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match="40 x 32 pixels; both sides must be multiples of 16"):
        model(torch.randn(1, 2, 3, 40, 32))
    with pytest.raises(ValueError, match=r"expected \(batch, 2, channels"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="`labels` has shape"):
        model(torch.randn(1, 2, 3, 32, 32), torch.zeros(1, 16, 32))
    for settings, words in (
        ({"max_disparity": 40}, "multiple of 16"),
        ({"aggregation": "hourglass"}, "stackhourglass, basic"),
        ({"num_hourglasses": 2}, "2 hourglasses"),
    ):
        with pytest.raises(ValueError, match=words):
            PSMNetConfig(**settings)


# --- section 11: one encoder, each view for itself ---


def test_one_encoder_reads_both_views():
    model = small_model().eval()
    names = [name for name in model.state_dict() if name.endswith("projection.weight")]
    assert names == ["backbone.projection.weight"]
    pixel_values = example_inputs(model.config, 2)["pixel_values"]
    expected = model(pixel_values).predicted_disparity
    clone = copy.deepcopy(model.backbone)
    views = [model.backbone(pixel_values[:, 0]), clone(pixel_values[:, 1])]
    volume = concat_cost_volume(*(view.last_hidden_state for view in views), 4)
    found = model._disparity(model.aggregation(volume)[-1], (32, 32))
    torch.testing.assert_close(found, expected)


def test_batch_norm_sees_the_views_one_after_the_other():
    model = small_model().train()
    norm = model.backbone.stem[0].normalization
    pixel_values = example_inputs(model.config, 2)["pixel_values"]
    mean = torch.zeros(4)
    for view in pixel_values.unbind(dim=1):
        mean = 0.9 * mean + 0.1 * model.backbone.stem[0].convolution(view).mean(dim=(0, 2, 3))
    model(pixel_values)
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean, mean)


def test_model_gives_features_and_volume():
    model = PSMNetModel(tiny_config()).eval()
    output = model(example_inputs(model.config, 2)["pixel_values"])
    assert output.last_hidden_state.shape == (2, 2, 4, 8, 8) and output.cost_volume.shape == (2, 8, 4, 8, 8)
    torch.testing.assert_close(output.cost_volume[:, :4, 0], output.last_hidden_state[:, 0])
    torch.testing.assert_close(output.cost_volume[:, 4:, 0], output.last_hidden_state[:, 1])


# --- section 11: the loss ---


def test_loss_is_the_weighted_sum_over_valid_pixels():
    model = small_model().train()
    inputs = example_inputs(model.config, 2)
    inputs["labels"] = inputs["labels"] * 1.3  # some beyond the largest
    inputs["labels"][:, :5] = 0
    output = model(**inputs)
    labels = inputs["labels"]
    valid = (labels > 0) & (labels < 16)
    assert 0 < valid.sum() < valid.numel() - 5 * 32 * 2
    disparities = [*output.intermediate_disparities, output.predicted_disparity]
    parts = [F.smooth_l1_loss(disparity[valid], labels[valid]) for disparity in disparities]
    torch.testing.assert_close(output.loss, 0.5 * parts[0] + 0.7 * parts[1] + parts[2])
    torch.testing.assert_close(list(output.losses.values()), parts)
    error = (disparities[-1][valid] - labels[valid]).abs().mean()
    torch.testing.assert_close(output.end_point_error, error)


def test_zero_is_a_value_where_it_is_said_to_be():
    model = small_model(mask_zero_disparity=False).eval()
    inputs = example_inputs(model.config, 1)
    inputs["labels"] = torch.zeros_like(inputs["labels"])
    output = model(**inputs)
    torch.testing.assert_close(output.end_point_error, output.predicted_disparity.mean())
    assert output.loss > 0


@pytest.mark.parametrize("unknown", [0.0, 16.0, float("inf"), float("nan")])
def test_invalid_pixels_carry_no_gradient(unknown):
    model = small_model().eval()
    disparity = torch.full((1, 4, 4), 5.0, requires_grad=True)
    labels = torch.full((1, 4, 4), 7.0)
    labels[:, :2] = unknown
    losses, _ = model._losses([disparity], labels)
    losses["prediction_1"].backward()
    assert (disparity.grad[:, :2] == 0).all() and (disparity.grad[:, 2:] < 0).all()


def test_no_valid_pixel_gives_zero_and_finite_gradients():
    model = small_model().train()
    inputs = example_inputs(model.config, 2)
    output = model(inputs["pixel_values"], torch.zeros_like(inputs["labels"]))
    output.loss.backward()
    assert output.loss == 0 and output.end_point_error == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_evaluation_makes_one_map_and_training_three():
    model, inputs = small_model(), example_inputs(tiny_config(), 2)
    trained = model.train()(inputs["pixel_values"])
    assert len(trained.intermediate_disparities) == 2 and trained.predicted_disparity.shape == (2, 32, 32)
    evaluated = model.eval()(inputs["pixel_values"])
    assert evaluated.intermediate_disparities == () and evaluated.loss is None
    basic = small_model(aggregation="basic").train()(**inputs)
    assert basic.intermediate_disparities == () and basic.loss == basic.losses["prediction_1"]


def test_weights_begin_as_the_papers():
    torch.manual_seed(0)
    model = PSMNetForStereoMatching(PSMNetConfig())
    convolution = model.backbone.stages[3][1].layers[0].convolution
    assert convolution.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    volume = model.aggregation.hourglasses[0].keep1.convolution
    assert volume.weight.std().item() == pytest.approx((2 / (27 * 64)) ** 0.5, rel=0.02)
    assert (model.aggregation.entry[0].normalization.weight == 1).all()


# --- section 11: it learns ---


@pytest.mark.slow
def test_it_learns_piecewise_constant_disparities(monkeypatch):
    # Each pair is seen once, so the last steps' errors are those of unseen pairs.
    monkeypatch.setattr(stereo, "PHOTOGRAPH_SHARE", 1.0)
    random = np.random.default_rng(0)
    textures = [random.integers(256, size=(24, 40, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(8)]
    pairs = SyntheticStereo(1600, (64, 128), 16, slant=0.0, noise=0.0, photographs=textures)
    torch.manual_seed(0)
    backbone_config = PSMNetFeaturesConfig(
        feature_channels=(8, 8, 16, 16, 16),
        num_blocks=(1, 1, 1, 1),
        pool_sizes=(16, 8),
        spp_channels=8,
        fusion_channels=16,
        hidden_size=8,
    )
    settings = {"max_disparity": 16, "volume_channels": 8, "aggregation": "basic", "num_residual_blocks": 2}
    model = PSMNetForStereoMatching(PSMNetConfig(backbone_config=backbone_config, **settings)).train()
    processor, optimizer = StereoImageProcessor(), torch.optim.Adam(model.parameters(), lr=2e-3)
    errors, constant = [], []
    for step in range(400):
        samples = [pairs.sample(4 * step + place) for place in range(4)]
        inputs = processor([[s.left, s.right] for s in samples], disparities=[s.disparity for s in samples])
        output = model(**inputs)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(output.end_point_error.item())
        constant.append((inputs["labels"] - inputs["labels"].median()).abs().mean().item())
    assert np.mean(errors[-40:]) < 1.0 and np.mean(errors[-40:]) < np.mean(constant[-40:]) / 2
