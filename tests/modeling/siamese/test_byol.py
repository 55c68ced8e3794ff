"""BYOL against its reference and against a loop written by hand, and every check of its spec (section 11 of
tribyol.md; TriBYOL's own are beside it)."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel, ViTConfig

from hf_masked import BYOLConfig, BYOLForPreTraining, BYOLModel, MultiViewImageProcessor, SimSiamForPreTraining
from hf_masked.modeling.parts.momentum import cosine_momentum
from hf_masked.modeling.siamese import simsiam
from hf_masked.modeling.siamese.byol import regression_loss, tiny_config
from hf_masked.training.optimization import LARS, parameter_groups
from tests.modeling.siamese.views import hard_views, moved, views
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "byol.json").read_text())
WIDTH = 16


def small_config(**settings) -> BYOLConfig:
    settings = {
        "backbone_config": tiny_config().backbone_config,
        "projection_dim": WIDTH,
        "projection_hidden_dim": 32,
        "predictor_hidden_dim": 32,
    } | settings
    return BYOLConfig(**settings)


def small_model(seed: int = 0, **settings) -> BYOLForPreTraining:
    torch.manual_seed(seed)
    return BYOLForPreTraining(small_config(**settings))


# --- the reference ---

_RENAMING = (
    (r"^projector/|^predictor/", lambda match: match[0][:-1] + "."),
    (r"^\w+/~/", "backbone."),
    (r"initial_conv", "embedder.embedder.convolution"),
    (r"initial_batchnorm", "embedder.embedder.normalization"),
    (r"block_group_(\d)/~/block_(\d)/~/", r"encoder.stages.\1.layers.\2."),
    (r"shortcut_conv", "shortcut.convolution"),
    (r"shortcut_batchnorm", "shortcut.normalization"),
    (r"\.conv_(\d)", r".layer.\1.convolution"),
    (r"\.batchnorm_(\d)", r".layer.\1.normalization"),
    (r"\.linear_1\.", ".3."),
    (r"\.linear\.", ".0."),
    (r"\.batch_norm\.", ".1."),
)


def our_name(name: str) -> str:
    for pattern, replacement in _RENAMING:
        name = re.sub(pattern, replacement, name)
    return name


def model_as_reference(run: str) -> tuple[dict, BYOLForPreTraining, torch.Tensor]:
    """The stored run, our model with its weights in float64, and its views."""
    stored = PARITY["pretraining"][run]
    reference, shapes = stored["config"], {our_name(name): shape for name, shape in stored["parameters"].items()}
    groups = [
        sum(f"stages.{stage}." in name and "layer.0.convolution" in name for name in shapes) for stage in range(4)
    ]
    config = BYOLConfig(
        backbone_config=ResNetConfig(
            embedding_size=shapes["backbone.embedder.embedder.convolution.weight"][0],
            hidden_sizes=[
                shapes[f"backbone.encoder.stages.{s}.layers.0.shortcut.convolution.weight"][0] for s in range(4)
            ],
            depths=groups,
            layer_type="basic" if run == "basic" else "bottleneck",
        ),
        projection_dim=reference["projector_output_size"],
        projection_hidden_dim=reference["projector_hidden_size"],
        predictor_hidden_dim=reference["predictor_hidden_size"],
        base_tau=reference["base_target_ema"],
    )
    model = BYOLForPreTraining(config)
    official = filled(stored["parameters"])
    weights = {our_name(name): value for name, value in official.items()}
    targets = filled({f"target/{name}": shape for name, shape in stored["parameters"].items()})
    targets = {our_name(name.removeprefix("target/")): value for name, value in targets.items()}
    weights |= {f"target.{name}": value for name, value in targets.items() if not name.startswith("predictor.")}
    report = model.load_state_dict(weights, strict=False)
    # Biases before a batch norm, which takes them away again, are left out here.
    redundant = {"projector.0.bias", "predictor.0.bias", "target.projector.0.bias"}
    assert set(report.unexpected_keys) == redundant
    assert all("running_" in name or "num_batches" in name for name in report.missing_keys)
    size = reference["image_size"]
    pixel_values = filled_pixels((reference["batch"], 2, 3, size, size), f"{run}.pixels")
    return stored, model.double().train(), pixel_values.double()


def close(ours: torch.Tensor, stored) -> None:
    stored = torch.tensor(stored, dtype=ours.dtype)
    torch.testing.assert_close(ours, stored, rtol=1e-5, atol=1e-5 * stored.abs().max().item())


def assert_norms(ours: dict[str, torch.Tensor], stored: dict[str, float]) -> None:
    for name, norm in stored.items():
        if our_name(name) not in ("projector.0.bias", "predictor.0.bias"):
            assert ours[our_name(name)].norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-12), name


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_outputs_and_gradients_are_the_references(run):
    stored, model, pixel_values = model_as_reference(run)
    output = model(pixel_values)
    # Loss arithmetic is in float32.
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    for view in (1, 2):
        close(output.online_predictions[:, view - 1], stored[f"prediction_view{view}"])
        close(output.target_projections[:, view - 1], stored[f"projection_view{view}"])
    output.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ours.keys() == {our_name(name) for name in stored["parameters"]} - {"projector.0.bias", "predictor.0.bias"}
    assert_norms(ours, stored["gradient_norms"])


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_step_of_optimizer_and_twin_is_the_references(run):
    """LARS, then the moving average at the schedule's tau."""
    stored, model, pixel_values = model_as_reference(run)
    before = copy.deepcopy(model.state_dict())
    reference = stored["config"]
    groups = parameter_groups(model, weight_decay=reference["weight_decay"])
    optimizer = LARS(groups, lr=reference["learning_rate"])
    model(pixel_values).loss.backward()
    optimizer.step()
    model.training_progress = reference["step"] / reference["max_steps"]
    assert model.target.momentum_at(model.training_progress) == pytest.approx(stored["tau"], rel=1e-7)
    model.update_twins()
    change = {name: value - before[name] for name, value in model.state_dict().items()}
    assert_norms(change, stored["online_change"])
    targets = {name.removeprefix("target."): value for name, value in change.items() if name.startswith("target.")}
    assert_norms(targets, stored["target_change"])


def test_tau_is_the_references():
    for case, tau in PARITY["target_ema"].items():
        base, step, steps = (float(number) for number in case.split())
        assert cosine_momentum(base)(step / steps) == pytest.approx(tau, abs=1e-8)


# --- a loop by hand ---


def encode(backbone: ResNetModel, projector: nn.Sequential, view: torch.Tensor) -> torch.Tensor:
    features = backbone(view).last_hidden_state.mean(dim=(2, 3))
    hidden = features @ projector[0].weight.T
    hidden = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, correction=0) + 1e-5).sqrt()
    return (hidden * projector[1].weight + projector[1].bias).relu() @ projector[3].weight.T


def predict(predictor: nn.Sequential, z: torch.Tensor) -> torch.Tensor:
    hidden = z @ predictor[0].weight.T
    hidden = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, correction=0) + 1e-5).sqrt()
    return (hidden * predictor[1].weight + predictor[1].bias).relu() @ predictor[3].weight.T


def test_training_equals_a_loop_by_hand():
    """Three steps of SGD and the moving average after each, from other target than online weights."""
    model = small_model(base_tau=0.8).train()
    moved(model.target)
    backbone, projector, predictor = (copy.deepcopy(m) for m in (model.backbone, model.projector, model.predictor))
    xi = {name: value.clone() for name, value in model.target.named_parameters()}
    target = copy.deepcopy(model.target).train()
    theta = [p for module in (backbone, projector, predictor) for p in module.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        v1, v2 = views(batch=6, seed=step).unbind(dim=1)
        with torch.no_grad():
            target.load_state_dict(target.state_dict() | xi)
            z1, z2 = (encode(target.backbone, target.projector, view) for view in (v1, v2))
        p1, p2 = (predict(predictor, encode(backbone, projector, view)) for view in (v1, v2))
        by_hand = 0
        for p, z in ((p1, z2), (p2, z1)):
            p, z = p / p.norm(dim=1, keepdim=True), z / z.norm(dim=1, keepdim=True)
            by_hand = by_hand + (p - z).square().sum(dim=1).mean()
        gradients = torch.autograd.grad(by_hand, theta)
        with torch.no_grad():
            for parameter, gradient in zip(theta, gradients, strict=True):
                parameter -= 0.1 * gradient
        online = {f"backbone.{n}": p for n, p in backbone.named_parameters()}
        online |= {f"projector.{n}": p for n, p in projector.named_parameters()}
        tau = 1 - (1 - 0.8) * (math.cos(math.pi * step / 3) + 1) / 2
        xi = {name: tau * value + (1 - tau) * online[name].detach() for name, value in xi.items()}

        loss = model(torch.stack([v1, v2], dim=1)).loss
        torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.training_progress = step / 3
        model.update_twins()
    for name, value in xi.items():
        torch.testing.assert_close(model.target.get_parameter(name), value, rtol=1e-4, atol=1e-5)


# --- section 11 ---


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_limits_of_tau(tau):
    """tau = 1: the target never changes; tau = 0: it equals the online network after one update."""
    model = small_model(base_tau=tau, tau_schedule="constant")
    before = copy.deepcopy(model.target.state_dict())
    moved(model.backbone, model.projector)
    model.update_twins()
    for name, value in model.target.named_parameters():
        assert torch.equal(value, before[name] if tau else model.get_parameter(name)), name
    assert not torch.equal(model.projector[0].weight, before["projector.0.weight"])


def test_target_begins_as_a_copy_without_a_predictor_and_without_gradient():
    model = small_model().train()
    assert {name for name, _ in model.target.named_children()} == {"backbone", "projector"}
    for name, value in model.target.named_parameters():
        assert torch.equal(value, model.get_parameter(name))
    model(views()).loss.backward()
    assert all(parameter.grad is None for parameter in model.target.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


def test_both_directions_give_the_online_network_gradient():
    """Each term alone: a view that is only a target gets none, although it matters."""
    for term, (source, other) in {"1_to_2": (0, 1), "2_to_1": (1, 0)}.items():
        model, pixel_values = small_model().train(), views().requires_grad_()
        parts = terms_of(model, pixel_values)
        parts[term].backward()
        gradient = pixel_values.grad.abs().amax(dim=(0, 2, 3, 4))
        assert gradient[source] > 0 and gradient[other] == 0
        changed = pixel_values.detach().clone()
        changed[:, other] += torch.randn(changed[:, other].shape, generator=torch.Generator().manual_seed(1))
        assert terms_of(small_model().train(), changed)[term] != parts[term]


def terms_of(model, pixel_values):
    projections = [model.projector(model.backbone(view).pooler_output.flatten(1)) for view in pixel_values.unbind(1)]
    predictions = [model.predictor(projection) for projection in projections]
    return model.loss_terms(predictions, model.targets(pixel_values.unbind(dim=1), projections))


def test_with_tau_0_and_the_same_heads_it_is_simsiam():
    """Both directions summed, 2 - 2 cos each: 4 + 4 times SimSiam's mean of -cos."""
    byol = small_model(base_tau=0.0, tau_schedule="constant").train()
    moved(byol)
    byol.update_twins()
    torch.manual_seed(0)
    other = SimSiamForPreTraining(simsiam.tiny_config()).train()
    other.backbone.load_state_dict(byol.backbone.state_dict())
    other.projector, other.predictor = copy.deepcopy(byol.projector), copy.deepcopy(byol.predictor)
    ours, theirs = byol(views()), other(views())
    torch.testing.assert_close(ours.loss, 4 + 4 * theirs.loss, rtol=1e-6, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    for name in ("projector.0.weight", "predictor.3.weight", "backbone.embedder.embedder.convolution.weight"):
        expected = 4 * other.get_parameter(name).grad
        torch.testing.assert_close(byol.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-5)


def test_each_term_lies_between_0_and_4():
    z = torch.randn(8, WIDTH)
    assert regression_loss(3 * z, 0.1 * z).item() == pytest.approx(0, abs=1e-5)
    assert regression_loss(z, -2 * z).item() == pytest.approx(4)
    assert 0 < regression_loss(z, torch.randn(8, WIDTH)) < 4
    by_hand = (nn.functional.normalize(z) - nn.functional.normalize(z.flip(0))).square().sum(dim=1).mean()
    torch.testing.assert_close(regression_loss(z, z.flip(0)), by_hand)
    assert regression_loss(z.half(), z.half()).dtype == torch.float32


def test_sum_is_twice_the_mean():
    pixel_values = views()
    summed, mean = (small_model(loss_reduction=kind).train()(pixel_values) for kind in ("sum", "mean"))
    torch.testing.assert_close(summed.loss, 2 * mean.loss)
    torch.testing.assert_close(summed.loss, sum(summed.losses.values()))
    assert list(summed.losses) == ["1_to_2", "2_to_1"]


def test_tau_rises_from_its_base_to_1():
    model = small_model()
    taus = [model.target.momentum_at(step / 20) for step in range(21)]
    assert taus[0] == pytest.approx(0.996) and taus[-1] == 1.0 and taus == sorted(taus)
    constant = small_model(tau_schedule="constant", base_tau=0.9)
    assert {constant.target.momentum_at(step / 20) for step in range(21)} == {0.9}


def test_target_is_saved_exactly_and_the_online_backbone_is_exported(tmp_path):
    model = small_model()
    moved(model)
    model.update_twins()
    model.train()(views())  # batch norm's statistics, each network's own
    model.save_pretrained(tmp_path / "ours")
    loaded = BYOLForPreTraining.from_pretrained(tmp_path / "ours")
    for name, value in model.target.state_dict().items():
        assert torch.equal(loaded.target.state_dict()[name], value), name
    assert not torch.equal(loaded.target.projector[0].weight, loaded.projector[0].weight)
    picture = views()[:, 0]
    encoder = BYOLModel.from_pretrained(tmp_path / "ours").eval()
    model.eval().backbone.save_pretrained(tmp_path / "plain")
    plain = ResNetModel.from_pretrained(tmp_path / "plain").eval()
    output = encoder(picture)
    assert torch.equal(plain(picture).pooler_output.flatten(1), output.pooler_output)
    assert torch.equal(output.projection, model.projector(output.pooler_output))


def trained(steps: int = 60, noise: float = 2.0, **settings):
    """The last step's output on hard views."""
    model = small_model(tau_schedule="constant", base_tau=0.9, **settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    data, generator = hard_views(noise), torch.Generator().manual_seed(0)
    for _ in range(steps):
        output = model(data[torch.randint(len(data), (32,), generator=generator)])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_twins()
    return output


def test_stays_apart_with_predictor_and_twin():
    assert trained().z_std > 0.3 / math.sqrt(WIDTH)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_collapses_without_a_predictor(stop_gradient):
    """Without the stop-gradient, and with the twin as the target too (paper, table 5b)."""
    collapsed = trained(stop_gradient=stop_gradient, use_predictor=False)
    assert collapsed.z_std < 0.1 / math.sqrt(WIDTH) and collapsed.loss < 0.05


# --- views, other encoders and settings ---


def test_views_are_those_of_the_paper():
    processor = MultiViewImageProcessor(**BYOLConfig().processor_settings())
    first, second = processor.photometric
    assert (first["blur_probability"], second["blur_probability"]) == (1.0, 0.1)
    assert (first["solarize_probability"], second["solarize_probability"]) == (0.0, 0.2)
    for settings in (first, second):
        strengths = [settings[name] for name in ("brightness", "contrast", "saturation", "hue")]
        assert strengths == [0.4, 0.4, 0.2, 0.1]
        assert (settings["jitter_probability"], settings["grayscale_probability"]) == (0.8, 0.2)
    assert (processor.num_views, processor.flip_probability, processor.crop_scale) == (2, 0.5, [0.08, 1.0])


def test_views_have_batch_statistics_of_their_own_in_both_networks():
    model, pixel_values = small_model().train(), views()
    output = model(pixel_values)
    for number in (0, 1):
        alone = small_model().train()
        features = alone.target.backbone(pixel_values[:, number]).pooler_output.flatten(1)
        torch.testing.assert_close(output.target_projections[:, number], alone.target.projector(features))
    steps = model.target.projector[1].num_batches_tracked
    assert steps == 2 and model.projector[1].num_batches_tracked == 2, "the target keeps statistics of its own"


def test_parameter_counts_of_the_heads():
    with torch.device("meta"):
        model = BYOLForPreTraining(BYOLConfig())
    assert sum(p.numel() for p in model.projector.parameters()) == 2048 * 4096 + 2 * 4096 + 4096 * 256
    assert sum(p.numel() for p in model.predictor.parameters()) == 256 * 4096 + 2 * 4096 + 4096 * 256


def test_transformer_trains_whole_and_at_other_sizes():
    backbone = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = small_model(backbone_config=backbone).train()
    output = model(views(), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    output.loss.backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0}
    assert all(name.endswith(("k_proj.bias", "key.bias")) for name in without)
    assert model(views(size=48)).online_predictions.shape == (8, 2, WIDTH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_tau": 1.5}, r"base_tau is 1\.5"),
        ({"tau_schedule": "linear"}, "tau_schedule is 'linear'"),
        ({"loss_reduction": "max"}, "loss_reduction is 'max'"),
        ({"predictor_hidden_dim": 0}, "predictor_hidden_dim is 0"),
        ({"projection_hidden_dim": 0}, "projection_hidden_dim is 0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small_config(**settings)


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 3, 3, 32, 32)])
def test_pictures_without_two_views_are_refused(shape):
    with pytest.raises(ValueError, match="2 views of each picture"):
        small_model()(torch.randn(shape))
