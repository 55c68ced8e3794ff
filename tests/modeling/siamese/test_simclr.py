"""SimCLR, by the checks of its spec (hallucinator.md, section 11).

Its loss is compared with plain loops and with the reference's objective in `tests/modeling/parts/test_contrast.py`.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from hf_masked import SimCLRConfig, SimCLRForPreTraining, SimCLRModel
from hf_masked.modeling.parts.heads import MLPHead
from tests.modeling.siamese.test_moco import BACKBONES, RESNET, retrieval, smooth_views, views


def small_model(seed: int = 0, **settings) -> SimCLRForPreTraining:
    torch.manual_seed(seed)
    defaults = {"backbone_config": copy.deepcopy(RESNET), "projection_dim": 16}
    return SimCLRForPreTraining(SimCLRConfig(**defaults | settings))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_whole_and_at_other_sizes(name):
    model = small_model(backbone_config=copy.deepcopy(BACKBONES[name]), zero_init_residual=False).train()
    model(views()).loss.backward()
    without = {
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)
    }
    # A bias of all keys moves every attention score of a query alike.
    assert not {n for n in without if not n.endswith(("k_proj.bias", "key.bias"))}
    assert model(views(size=48)).logits.shape == (8, 8)


def test_both_views_get_the_gradient_and_the_loss_is_symmetric():
    model, pixel_values = small_model(zero_init_residual=False).train(), views().requires_grad_()
    loss = model(pixel_values).loss
    loss.backward()
    assert (pixel_values.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    torch.testing.assert_close(model(views().flip(1)).loss, loss)


def test_batch_statistics_are_those_of_both_views_together():
    model, pixel_values = small_model().train(), views()
    output = model(pixel_values)
    alone = small_model().train()
    together = torch.cat([pixel_values[:, 0], pixel_values[:, 1]])
    features = alone.backbone(together).pooler_output.flatten(1)
    torch.testing.assert_close(torch.cat([output.z1, output.z2]), F.normalize(alone.projector(features), dim=1))


def test_reduction_mean_is_half_of_the_sum():
    whole, half = (small_model(loss_reduction=reduction).eval()(views()).loss for reduction in ("sum", "mean"))
    torch.testing.assert_close(half, whole / 2)


def test_temperature_divides_the_logits():
    cold, warm = (small_model(temperature=temperature).eval()(views()).logits for temperature in (0.1, 0.5))
    torch.testing.assert_close(cold, 5 * warm)


def test_projectors():
    def kinds(**settings):
        return [type(layer).__name__ for layer in small_model(**settings).projector]

    assert kinds() == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert kinds(projector_last_norm=False) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert kinds(heads_batch_norm=False) == ["Linear", "ReLU", "Linear"]
    assert kinds(projection_layers=3).count("Linear") == 3
    last = small_model().projector[-1]
    assert last.bias is None and last.weight is not None and small_model().projector[-2].bias is None
    assert small_model(projector_last_norm=False).projector[-1].bias is not None
    torch.testing.assert_close(last(torch.randn(64, 16)).mean(dim=0), torch.zeros(16), rtol=0, atol=1e-6)


def test_parameter_counts_of_the_projector():
    with torch.device("meta"):
        two, three = (SimCLRModel(SimCLRConfig(projection_layers=layers)).projector for layers in (2, 3))
    assert sum(p.numel() for p in two.parameters()) == 2048**2 + 2 * 2048 + 2048 * 128 + 128
    assert sum(p.numel() for p in three.parameters()) == 2 * (2048**2 + 2 * 2048) + 2048 * 128 + 128


def test_norm_without_shift_survives_saving(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = SimCLRForPreTraining.from_pretrained(tmp_path)
    assert isinstance(loaded.projector, MLPHead) and loaded.projector[-1].bias is None
    assert torch.equal(loaded.eval()(views()).loss, model.eval()(views()).loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"loss_reduction": "max"}, "loss_reduction is 'max'"),
        ({"projection_dim": 0}, "projection_dim is 0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(**settings)


def test_learns_to_find_the_other_view():
    model, data = small_model(projection_dim=32), smooth_views(320)
    untrained = retrieval(model, data[256:])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        model.train()
        loss = model(data[torch.randperm(256, generator=generator)[:32]]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = retrieval(model, data[256:])
    assert trained > untrained + 0.25, (untrained, trained)
