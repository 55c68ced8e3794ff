"""The Hallucinator on MoCo, SimCLR and SimSiam: every check of its spec (section 11)."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hf_masked import (
    HallucinatedMoCoConfig,
    HallucinatorConfig,
    MoCoConfig,
    MoCoForPreTraining,
    SimCLRConfig,
    SimCLRForPreTraining,
    SimSiamConfig,
    SimSiamForPreTraining,
)
from hf_masked.modeling.parts.hallucinator import Hallucinator, extrapolate
from hf_masked.modeling.parts.losses import info_nce, negative_cosine, nt_xent
from tests.modeling.siamese.test_moco import RESNET
from tests.modeling.siamese.views import views

BASES = {
    "moco": (MoCoForPreTraining, MoCoConfig, {"queue_size": 24}),
    "simclr": (SimCLRForPreTraining, SimCLRConfig, {"zero_init_residual": False}),
    "simsiam": (
        SimSiamForPreTraining,
        SimSiamConfig,
        {"zero_init_residual": False, "predictor_hidden_dim": 8, "projection_layers": 2},
    ),
}


def small_model(base: str, hallucinator: dict | None = None, **settings):
    """The base's weights do not depend on the Hallucinator."""
    model_class, config_class, own = BASES[base]
    settings = {"backbone_config": copy.deepcopy(RESNET), "projection_dim": 16} | own | settings
    torch.manual_seed(0)
    alone = model_class(config_class(**settings))
    if hallucinator is None:
        return alone
    model = model_class(config_class(**settings, hallucinator_config=hallucinator))
    missing = model.load_state_dict(alone.state_dict(), strict=False).missing_keys
    assert all(name.startswith("hallucinator.") for name in missing)
    return model


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def hallucinator(dim: int = 16, **settings) -> Hallucinator:
    torch.manual_seed(0)
    return Hallucinator(HallucinatorConfig(**settings), dim)


@torch.no_grad()
def as_identity(module: Hallucinator) -> None:
    """With the last linear layer zeroed and the residual, h is the extrapolated feature."""
    module.smoothing[-1].weight.zero_()
    module.smoothing[-1].bias.zero_()


# --- section 11 ---


@pytest.mark.parametrize("base", BASES)
def test_weight_zero_is_the_base_method(base):
    """Loss and gradients of all base parameters, bit for bit."""
    alone, model = small_model(base).train(), small_model(base, {"weight": 0.0}).train()
    losses = [each(views()).loss for each in (alone, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_without_extrapolation_and_map_the_losses_are_equal():
    """lam = 0, residual, last linear zeroed: h = a, hence L_hal = L_base (MoCo)."""
    model = small_model("moco", {"lam_max": 0.0}).train()
    as_identity(model.hallucinator)
    output = model(views())
    torch.testing.assert_close(output.losses["hallucination"], output.losses["contrast"])
    torch.testing.assert_close(output.loss.detach(), 2 * output.losses["contrast"])


def test_without_extrapolation_and_residual_it_is_the_map():
    """lam = 0 gives H(a, b) = MLP(a), whatever b."""
    module, a = hallucinator(residual=False), unit(8, 16)
    zero = torch.zeros(8, 1)
    assert torch.equal(module(a, unit(8, 16, seed=1), zero), module(a, unit(8, 16, seed=2), zero))
    torch.testing.assert_close(module(a, unit(8, 16, seed=1), zero), module.smoothing(a))


def test_extrapolation_leads_away_from_the_partner_and_the_further_the_more():
    a, b = unit(64, 16), unit(64, 16, seed=1)
    cosines = [
        F.cosine_similarity(extrapolate(a, b, torch.full((64, 1), lam)), b) for lam in (0.0, 0.1, 0.5, 1.0, 10.0)
    ]
    torch.testing.assert_close(cosines[0], (a * b).sum(dim=1))
    assert all((later < earlier).all() for earlier, later in pairwise(cosines))
    lam = torch.rand(64, 1)
    torch.testing.assert_close(extrapolate(a, a, lam), a)
    torch.testing.assert_close(extrapolate(a, b, lam), (1 + lam) * a - lam * b)


@pytest.mark.parametrize("base", BASES)
def test_its_parameters_get_a_gradient_and_key_encoder_and_queue_none(base):
    model = small_model(base, {}).train()
    before = model.queue() if base == "moco" else None
    output = model(views())
    output.loss.backward()
    for name, parameter in model.hallucinator.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    if base == "moco":
        assert all(parameter.grad is None for parameter in model.twin.parameters())
        # Real keys alone enter the queue.
        assert torch.equal(model.queue()[:8], output.key) and torch.equal(model.queue()[8:], before[8:])


def test_parameters_are_few():
    """Of the order of 2 D^2: 0.3 % of a ResNet-18's 11.2 million, 0.12 % of MoCo v2's ResNet-50."""
    count = sum(p.numel() for p in hallucinator(128).parameters())
    assert count == 2 * 128**2 + 2 * 128 + 128 and count < 0.003 * 11.2e6


# --- what each base adds, and section 8 ---


def fixed_lam(model, value: float = 0.7) -> torch.Tensor:
    model.hallucinator.draw_lam = lambda features: torch.full((len(features), 1), value)


def test_on_moco_it_is_info_nce_of_the_hallucinated_query():
    model = small_model("moco", {}).train()
    fixed_lam(model)
    queue = model.queue()
    output = model(views())
    h = model.hallucinator(output.query, output.key)
    expected, _ = info_nce(F.normalize(h, dim=1), output.key, queue, model.config.temperature)
    torch.testing.assert_close(output.losses["hallucination"], expected.detach())


def test_on_simclr_both_views_are_hallucinated_and_nothing_is_compared_with_it():
    model = small_model("simclr", {}).train()
    fixed_lam(model)
    output = model(views())
    h = [model.hallucinator(*pair) for pair in ((output.z1, output.z2), (output.z2, output.z1))]
    expected, _ = nt_xent(output.z1, output.z2, 0.1, tuple(F.normalize(each, dim=1) for each in h))
    torch.testing.assert_close(output.losses["hallucination"], expected.detach())


@pytest.mark.parametrize("symmetric", [True, False])
def test_on_simsiam_predictions_are_hallucinated(symmetric):
    model = small_model("simsiam", {}, symmetric=symmetric).train()
    fixed_lam(model)
    output = model(views())
    pairs = [(output.p1, output.z2), (output.p2, output.z1)][: 1 + symmetric]
    parts = [negative_cosine(model.hallucinator(F.normalize(p, dim=1), F.normalize(z, dim=1)), z) for p, z in pairs]
    torch.testing.assert_close(output.losses["hallucination"], (sum(parts) / len(parts)).detach())


def test_partners_without_gradient_stay_so():
    """SimSiam without a predictor: the target branch gets no gradient through the extrapolation either."""
    model = small_model("simsiam", {}, use_predictor=False, symmetric=False).train()
    pixel_values = views().requires_grad_()
    model(pixel_values).loss.backward()
    first, second = pixel_values.grad.unbind(dim=1)
    assert first.abs().max() > 0 and second.abs().max() == 0


@pytest.mark.parametrize("base", BASES)
def test_evaluation_reports_the_base_loss_alone(base):
    alone, model = small_model(base).eval(), small_model(base, {}).eval()
    expected, output = alone(views()), model(views())
    assert torch.equal(output.loss, expected.loss) and output.losses.keys() == expected.losses.keys()
    assert "hallucination" in model.train()(views()).losses


def test_lam_is_drawn_per_sample_and_has_no_gradient():
    features = unit(4096, 16).requires_grad_()
    for module, mean, variance in (
        (hallucinator(lam_max=2.0), 1.0, 4 / 12),
        (hallucinator(mode="beta", beta_alpha=2.0), 0.5, 1 / 20),
    ):
        lam = module.draw_lam(features)
        assert lam.shape == (4096, 1) and not lam.requires_grad and lam.min() >= 0
        assert lam.mean().item() == pytest.approx(mean, abs=0.05)
        assert lam.var().item() == pytest.approx(variance, rel=0.1)


def test_starts_at_its_share_of_the_training():
    model = small_model("moco", {"start": 0.5, "weight": 2.0}).train()

    def share(progress: float) -> float:
        model.training_progress = progress
        model.on_progress()
        output = model(views())
        return ((output.loss - output.losses["contrast"]) / output.losses["hallucination"]).item()

    assert share(0.0) == share(0.49) == 0.0
    assert share(0.5) == pytest.approx(2.0, rel=1e-4) and share(1.0) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_config_round_trips_and_features_leave_it_behind(base, tmp_path):
    from transformers import AutoModel

    model = small_model(base, {"mode": "beta", "hidden_dim": 8})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.config.hallucinator_config, HallucinatorConfig)
    assert loaded.config.hallucinator_config.mode == "beta" and loaded.hallucinator.smoothing[0].out_features == 8
    for name, value in model.hallucinator.state_dict().items():
        assert torch.equal(loaded.hallucinator.state_dict()[name], value), name
    _, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))


def test_the_catalogues_hallucinator_has_it_on():
    assert HallucinatedMoCoConfig().hallucinator_config.weight == 1.0 and MoCoConfig().hallucinator_config is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "normal"}, "mode is 'normal'"),
        ({"lam_max": -1.0}, "lam_max is -1.0"),
        ({"weight": -0.5}, "weight is -0.5"),
        ({"beta_alpha": 0.0}, "beta_alpha is 0.0"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"start": 1.5}, "start is 1.5"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MoCoConfig(hallucinator_config=settings)
