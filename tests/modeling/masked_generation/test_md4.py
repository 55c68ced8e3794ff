"""MD4 and GenMD4 against their reference, and the checks of their spec (section 11)."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hf_masked import (
    GenMD4Config,
    GenMD4ForPreTraining,
    MD4Config,
    MD4ForPreTraining,
    MD4Model,
    MD4TransformerConfig,
    MD4UNetConfig,
)
from hf_masked.modeling.masked_generation.md4 import MaskingSchedule, convert_official_weights, tiny_network
from hf_masked.modeling.masked_generation.md4_networks import tokens_of_pixels
from tests.parity.fill import filled, filled_noise

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "md4.json").read_text())

TEXT = {
    "vocab_size": 5,
    "max_length": 6,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "embedding_size": 8,
    "conditioning_size": 8,
}


def text_model(kind=MD4ForPreTraining, seed: int = 0, network: dict | None = None, **settings):
    torch.manual_seed(seed)
    form = MD4TransformerConfig(**TEXT | {"zero_init": False} | (network or {}))
    return kind(kind.config_class(backbone_config=form, average_momentum=None, timesteps=6, **settings))


def texts(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, (batch, 6), generator=torch.Generator().manual_seed(seed))


# The reference, through the stored values


def reference_network(run: dict) -> MD4TransformerConfig | MD4UNetConfig:
    settings, shape = run["settings"], run["shape"]
    common = {
        "vocab_size": settings["vocab_size"],
        "conditioning_size": settings["feature_dim"],
        "time_features": settings.get("time_features", "t"),
        "num_classes": run["classes"],
        "dropout": 0.0,
    }
    if len(shape) == 1:
        return MD4TransformerConfig(
            max_length=shape[0],
            hidden_size=settings["feature_dim"] * settings["num_heads"],
            num_hidden_layers=settings["n_layers"],
            num_attention_heads=settings["num_heads"],
            embedding_size=settings["feature_dim"] if settings["outside_embed"] else None,
            gate=settings["mlp_type"],
            **common,
        )
    return MD4UNetConfig(
        image_size=shape[:2],
        num_channels=shape[2],
        num_layers=settings["n_layers"],
        channel_multipliers=settings.get("ch_mult", [1]),
        num_dit_layers=settings.get("n_dit_layers", 0),
        dit_hidden_size=settings.get("dit_hidden_size", 768),
        dit_num_attention_heads=settings.get("dit_num_heads", 12),
        **common,
    )


def reference_model(run: dict, kind=MD4ForPreTraining):
    settings = {"continuous_time": run["cont_time"]}
    if kind is MD4ForPreTraining:
        schedule = run["settings"].get("noise_schedule_type", "linear")
        settings |= {"noise_schedule": schedule, "timesteps": run["settings"].get("timesteps", 256)}
    config = kind.config_class(backbone_config=reference_network(run), average_momentum=None, **settings)
    # Matrices of the reference are "kernel" or "embedding", and norms have a "scale": weights, to the fill.
    weights = ("kernel", "embedding", "scale")
    suffix = {name: ".weight" if name.endswith(weights) else "" for name in run["parameters"]}
    values = filled({name + suffix[name]: shape for name, shape in run["parameters"].items()})
    official = {name: values[name + suffix[name]] for name in run["parameters"]}
    model = kind(config)
    model.load_state_dict(convert_official_weights(official, config))
    return model.eval()


def reference_inputs(name: str, run: dict) -> dict:
    """The reference's pictures are (batch, height, width, channels)."""
    batch, shape = run["batch"], run["shape"]
    units = math.prod(shape)
    vocab_size = run["settings"]["vocab_size"]
    tokens = filled_noise(1, batch * units, f"{name}.tokens")[0].double() * vocab_size
    tokens = tokens.floor().long().clamp(0, vocab_size - 1).view(batch, *shape)
    masks = [(filled_noise(batch, units, f"{name}.mask{i}") < 0.6).view(batch, *shape) for i in range(2)]
    if len(shape) == 3:
        tokens, *masks = (value.permute(0, 3, 1, 2) for value in (tokens, *masks))
    return {
        "ids": tokens.contiguous(),
        "masks": [mask.flatten(1) for mask in masks],
        "times": torch.tensor(run["times"]),
        "classes": torch.arange(batch) % run["classes"] if run["classes"] else None,
    }


@pytest.mark.parametrize("name", ["text", "timeless", "discrete", "unet", "uvit"])
def test_equals_the_reference(name):
    run = PARITY["runs"][name]
    model, inputs = reference_model(run), reference_inputs(name, run)
    output = model(
        input_ids=inputs["ids"],
        classes=inputs["classes"],
        times=inputs["times"],
        bool_masked_pos=inputs["masks"][0],
    )
    logits = output.logits
    if len(run["shape"]) == 3:  # to the reference's order
        height, width, channels = run["shape"]
        logits = logits.unflatten(1, (channels, height, width)).permute(0, 2, 3, 1, 4).flatten(1, 3)
    units = math.prod(run["shape"])
    expected = torch.tensor(run["logits"])
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits[:, :: max(1, units // 8)], expected, rtol=1e-5, atol=1e-5 * scale)
    if not run["cont_time"]:  # the reference's loss, and what its network sees, are at the end of the step
        inputs["times"] = model.rescale_times(inputs["times"])
        output = model(input_ids=inputs["ids"], times=inputs["times"], bool_masked_pos=inputs["masks"][0])
    nats = model.diffusion_loss(inputs["ids"], output.logits, inputs["masks"][0], inputs["times"])
    torch.testing.assert_close(nats, torch.tensor(run["diffusion"]), rtol=1e-5, atol=0)
    # The reference computes 1 - 0.9999 in float32.
    bits = run["reconstruction"] / units / math.log(2)
    assert model.reconstruction_loss() == pytest.approx(bits, rel=1e-3)
    nats.mean().backward()
    check_gradients(model, run)


def check_gradients(model, run):
    found = {name: p.grad for name, p in model.named_parameters()}
    official = {name: torch.zeros(shape) for name, shape in run["parameters"].items()}
    norms = {}
    for name in official:  # by the converter's names, one at a time
        (ours,) = convert_official_weights({name: official[name]}, model.config)
        norms[name] = 0.0 if found[ours] is None else found[ours].norm().item()
    largest = max(run["gradient_norms"].values())
    assert norms == pytest.approx(run["gradient_norms"], rel=1e-4, abs=1e-6 * largest)


def test_genmd4_equals_the_reference():
    run = PARITY["runs"]["genmd4"]
    model, inputs = reference_model(run, GenMD4ForPreTraining), reference_inputs("genmd4", run)
    ids, times = inputs["ids"], inputs["times"]
    powers = model.schedule()
    logits = [model.predict(ids, mask, times, None)[1] for mask in inputs["masks"]]
    pairs = zip(logits, inputs["masks"], strict=True)
    first, second = (model.weighted_loss(ids, predicted, mask, times, powers) for predicted, mask in pairs)
    torch.testing.assert_close(first, torch.tensor(run["first"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, torch.tensor(run["second"]), rtol=1e-5, atol=1e-5)
    likelihoods = [model.log_probability(ids, mask, times, powers) for mask in inputs["masks"]]
    surrogate = 0.5 * (first - second).detach() * (likelihoods[0] - likelihoods[1])
    torch.testing.assert_close(surrogate, torch.tensor(run["surrogate"]), rtol=1e-4, atol=1e-4)
    lost = model.lost_at_first_time(ids, powers)
    torch.testing.assert_close(lost, torch.tensor(run["reconstruction"]), rtol=1e-4, atol=1e-6)
    output = model.objectives(ids, logits, inputs["masks"], times, powers)
    (output["loss"] * math.log(2) * ids[0].numel()).backward()
    expected = torch.tensor(run["schedule_gradient"])
    largest = expected.abs().max().item()
    torch.testing.assert_close(model.schedule.raw_powers.grad, expected, rtol=1e-4, atol=1e-5 * largest)
    check_gradients(model, run)


@pytest.mark.parametrize("kind", ["linear", "cosine", "poly3"])
def test_schedules_equal_the_reference(kind):
    stored, schedule = PARITY["schedules"], MaskingSchedule(kind, eps=1e-4)
    times = torch.tensor(stored["times"])
    torch.testing.assert_close(schedule.alpha(times), torch.tensor(stored[kind]["alpha"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.weight(times), torch.tensor(stored[kind]["weight"]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_sampling_times_equal_the_reference(grid):
    times = text_model().sampling_times(5, grid)
    torch.testing.assert_close(times[:-1], torch.tensor(PARITY["grids"][grid]), rtol=1e-5, atol=1e-6)
    assert times[-1] == 0 or times[-1].item() == pytest.approx(0, abs=1e-6)


# The spec's checks


def test_linear_weight_and_uniform_predictions_make_the_entropy_of_guessing():
    schedule, times = MaskingSchedule("linear", eps=0.0), torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(schedule.weight(times), -1 / times)
    # zero_init: all values alike; the mean over many times is log2 V within the sampling's error.
    model = text_model(network={"zero_init": True})
    ids = texts(1).expand(4000, -1)
    assert model(input_ids=ids).logits.abs().max() == 0
    assert model(input_ids=ids).loss.item() == pytest.approx(math.log2(5), rel=0.05)


def test_discrete_loss_tends_to_the_continuous_one():
    ids, mask = texts(3), torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs = {"input_ids": ids, "bool_masked_pos": mask, "times": torch.tensor([0.25, 0.5, 0.75])}
    # Of the linear schedule both are equal.
    continuous = text_model(noise_schedule="cosine").eval()(**inputs).loss
    errors = []
    for steps in (4, 64, 1024):
        model = text_model(noise_schedule="cosine", continuous_time=False).eval()
        model.config.timesteps = steps
        errors.append((model(**inputs).loss - continuous).abs().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 0.01 * continuous


def test_times_are_spread_evenly_from_one_random_start():
    model = text_model().train()
    torch.manual_seed(0)
    times = model(input_ids=texts(8)).times
    torch.testing.assert_close(times.sort().values.diff(), torch.full((7,), 1 / 8))
    assert not torch.equal(model(input_ids=texts(8)).times, times)
    given = model(input_ids=texts(4), time_noise=torch.tensor([0.5, 0.1, 0.2, 0.3])).times
    torch.testing.assert_close(given, torch.tensor([0.5, 0.75, 0.0, 0.25]))
    model.config.antithetic = False
    drawn = model(input_ids=texts(4), time_noise=torch.tensor([0.5, 0.1, 0.2, 0.3])).times
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.1, 0.2, 0.3]))


def test_share_of_masked_tokens_is_the_time():
    times = torch.tensor([0.2, 0.7])
    ids = torch.zeros(2, 20_000, dtype=torch.int64)
    output = text_model(network={"num_hidden_layers": 1, "max_length": 20_000}).draw(ids, times, None, None, None)
    masked = (output[1][:, 0] >= MaskingSchedule("linear", 1e-4).alpha(times)[:, None]).float().mean(dim=1)
    torch.testing.assert_close(masked, times, rtol=0, atol=0.02)


def test_genmd4_with_equal_powers_is_md4():
    ids, mask = texts(3), torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    inputs = {"input_ids": ids, "bool_masked_pos": mask, "times": torch.tensor([0.2, 0.6, 1.0])}
    plain = text_model(schedule_eps=0.0).eval()
    general = text_model(GenMD4ForPreTraining, schedule_eps=0.0).eval()
    general.backbone.load_state_dict(plain.backbone.state_dict())
    expected, found = plain(**inputs), general(**inputs)
    torch.testing.assert_close(found.losses["diffusion"], expected.losses["diffusion"])
    torch.testing.assert_close(found.bits_per_token, found.losses["diffusion"] + found.losses["reconstruction"])


def test_gradient_of_the_schedules_is_that_of_the_expected_loss():
    # Two tokens of two values: all four maskings can be summed, and all sixteen pairs of them.
    network = {"vocab_size": 2, "max_length": 2}
    model = text_model(GenMD4ForPreTraining, network=network).eval()
    with torch.no_grad():
        model.schedule.raw_powers.copy_(torch.tensor([0.3, 0.9]))
    ids, times = torch.tensor([[0, 1]]), torch.tensor([0.4])
    masks = [torch.tensor([[a, b]]) for a in (False, True) for b in (False, True)]
    logits = [model.predict(ids, mask, times, None)[1].detach() for mask in masks]

    def probability(mask, powers):
        return model.log_probability(ids, mask, times, powers).exp()

    def expected_loss(raw):
        powers = F.softplus(raw)
        terms = (
            probability(mask, powers) * model.weighted_loss(ids, predicted, mask, times, powers)
            for mask, predicted in zip(masks, logits, strict=True)
        )
        return sum(terms).sum()

    raw = torch.tensor([0.3, 0.9], requires_grad=True)
    (expected,) = torch.autograd.grad(expected_loss(raw), raw)
    found = torch.zeros(2)
    for first, first_logits in zip(masks, logits, strict=True):
        for second, second_logits in zip(masks, logits, strict=True):
            raw = torch.tensor([0.3, 0.9], requires_grad=True)
            powers = F.softplus(raw)
            output = model.objectives(ids, (first_logits, second_logits), (first, second), times, powers)
            loss = output["loss"] * math.log(2) * 2 - model.lost_at_first_time(ids, powers).mean()
            weight = (probability(first, powers) * probability(second, powers)).detach()
            found += weight * torch.autograd.grad(loss, raw)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_visible_tokens_carry_no_loss():
    model = text_model()
    mask = torch.tensor([[True, False, True, False, False, False]])
    logits = torch.randn(1, 6, 5, requires_grad=True)
    for kind in (model, text_model(GenMD4ForPreTraining)):
        if kind is model:
            loss = model.diffusion_loss(texts(1), logits, mask, torch.tensor([0.5]))
        else:
            loss = kind.weighted_loss(texts(1), logits, mask, torch.tensor([0.5]), kind.schedule())
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient[~mask].abs().max() == 0 and gradient[mask].abs().min() > 0


@pytest.mark.parametrize("kind", [MD4ForPreTraining, GenMD4ForPreTraining])
@pytest.mark.parametrize("time", [1e-3, 1.0])
def test_loss_is_finite_at_the_ends_of_time(kind, time):
    output = text_model(kind)(input_ids=texts(4), times=torch.full((4,), time))
    assert output.loss.isfinite()


# The sampler


class Oracle:
    """In place of a network: the true conditionals of two bits."""

    joint = torch.tensor([[0.5, 0.1], [0.05, 0.35]])

    def __call__(self, ids, bool_masked_pos, times, classes):
        other = ids.masked_fill(bool_masked_pos, 2).flip(1)
        conditionals = torch.stack([self.joint.T, self.joint])  # of each position: (its partner's value, its own)
        conditionals = conditionals / conditionals.sum(dim=-1, keepdim=True)
        marginals = torch.stack([self.joint.sum(dim=1), self.joint.sum(dim=0)])
        position = torch.arange(2).expand_as(ids)
        known = conditionals[position, other.clamp(max=1)]
        return None, torch.where((other == 2).unsqueeze(-1), marginals[position], known).log()


def test_samples_follow_the_joint_distribution_of_an_oracle(monkeypatch):
    model = text_model(network={"vocab_size": 2, "max_length": 2})
    monkeypatch.setattr(model, "predict", Oracle())
    count = 4000
    # Many steps: hardly ever are both bits revealed in one.
    ids = model.generate(count, steps=200, seed=0, progress=False, sampling_grid="uniform").token_ids
    observed = torch.bincount(2 * ids[:, 0] + ids[:, 1], minlength=4)
    expected = Oracle.joint.flatten() * count
    assert ((observed - expected).square() / expected).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001
    few = model.generate(count, steps=1, seed=0, progress=False).token_ids
    assert (few[:, 0] == few[:, 1]).float().mean() < 0.7  # in one step the bits are independent: 0.85 in truth


@pytest.mark.parametrize("kind", [MD4ForPreTraining, GenMD4ForPreTraining])
def test_sampler_keeps_what_is_known_and_unmasks_the_rest(kind, monkeypatch):
    model = text_model(kind)
    given, mask = texts(3), torch.tensor([[True, False, True, True, False, False]]).expand(3, -1)
    counts, predict = [], model.predict

    def watched(ids, bool_masked_pos, times, classes):
        counts.append(int(bool_masked_pos.sum()))
        return predict(ids, bool_masked_pos, times, classes)

    monkeypatch.setattr(model, "predict", watched)
    arguments = {"input_ids": given, "bool_masked_pos": mask, "steps": 20, "progress": False}
    ids = model.generate(seed=1, **arguments).token_ids
    assert counts[0] == 9 and counts == sorted(counts, reverse=True) and len(set(counts)) > 3
    assert torch.equal(ids[~mask], given[~mask]) and ids.max() < 5
    assert torch.equal(model.generate(seed=1, **arguments).token_ids, ids)
    others = [model.generate(seed=seed, **arguments).token_ids for seed in range(2, 6)]
    assert any(not torch.equal(other, ids) for other in others)


def test_low_temperature_and_top_p_take_the_most_probable_value():
    model = text_model().eval()
    ids = torch.full((2, 6), 5)
    for temperature, top_p in ((1e-3, 1.0), (1.0, 1e-6)):
        probabilities = model._probabilities(ids, torch.tensor(0.5), None, temperature, top_p)
        torch.testing.assert_close(probabilities.amax(dim=-1), torch.ones(2, 6))
    kept = model._probabilities(ids, torch.tensor(0.5), None, 1.0, 0.5)
    whole = model._probabilities(ids, torch.tensor(0.5), None, 1.0, 1.0)
    assert (whole[kept > 0].view(-1).sum() < whole.sum()) and ((whole * (kept > 0)).sum(dim=-1) >= 0.5 - 1e-6).all()


def test_classes_change_the_samples_and_are_asked_for():
    model = text_model(network={"num_classes": 3})
    with pytest.raises(ValueError, match="3 classes"):
        model.generate(2, steps=2, progress=False)
    assert model.generate(classes=[0, 2], steps=2, progress=False).token_ids.shape == (2, 6)
    assert model.uses_classes and not text_model().uses_classes
    probabilities = [
        model._probabilities(torch.full((1, 6), 5), torch.tensor(1.0), torch.tensor([number]), 1.0, 1.0)
        for number in range(2)
    ]
    assert (probabilities[0] - probabilities[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="knows no classes"):
        text_model().generate(classes=[1], steps=2, progress=False)


def test_wrong_arguments_are_named():
    model = text_model()
    for arguments, message in (
        ({"steps": 0}, "steps=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"input_ids": texts(2)}, "bool_masked_pos"),
        ({"sampling_grid": "line"}, "'line'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(2, progress=False, **arguments)
    with pytest.raises(ValueError, match="span 0 to 5"):
        model(input_ids=torch.tensor([[0, 5]]))
    pictures = MD4ForPreTraining(MD4Config(backbone_config=tiny_network()))
    with pytest.raises(ValueError, match="image_mean"):
        pictures(torch.randn(2, 3, 8, 8))
    for settings in ({"noise_schedule": "poly"}, {"sampling_grid": "line"}, {"average_momentum": 2.0}):
        with pytest.raises(ValueError, match="must"):
            MD4Config(backbone_config=tiny_network(), **settings)
    with pytest.raises(ValueError, match="channels"):
        MD4UNetConfig(conditioning_size=24)


# Pictures, evaluation


def test_pixels_are_bytes_or_parts_of_the_scale():
    steps = torch.arange(256).float() / 255
    assert torch.equal(tokens_of_pixels(steps, 256), torch.arange(256))
    assert torch.equal(tokens_of_pixels(steps, 4), torch.arange(256) // 64)


def test_average_of_the_weights_evaluates_and_generates():
    torch.manual_seed(0)
    model = MD4ForPreTraining(MD4Config(backbone_config=tiny_network(), average_momentum=0.5))
    pictures = torch.rand(2, 3, 8, 8)
    mask = torch.rand(2, 192) < 0.5
    before = model.eval()(pictures, bool_masked_pos=mask).logits
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.1)
    assert torch.equal(model(pictures, bool_masked_pos=mask).logits, before)
    model.update_twins()
    assert not torch.equal(model(pictures, bool_masked_pos=mask).logits, before)


def test_bound_is_the_mean_loss_over_times():
    model = text_model()
    ids = texts(64)
    bound = model.evidence_bound(input_ids=ids, num_times=64)
    torch.testing.assert_close(bound.nats_per_token, bound.bits_per_token * math.log(2))
    assert bound.perplexity.log().item() == pytest.approx(bound.nats_per_token.mean().item())
    losses = torch.stack([model(input_ids=ids, generator=torch.Generator().manual_seed(i)).loss for i in range(64)])
    assert bound.bits_per_token.mean().item() == pytest.approx(losses.mean().item(), rel=0.03)
    assert text_model(GenMD4ForPreTraining).evidence_bound(input_ids=ids).bits_per_token.shape == (64,)


def test_encoder_of_texts_tells_hidden_states_and_attentions():
    form = MD4TransformerConfig(**TEXT)
    model = MD4Model(MD4Config(backbone_config=form)).eval()
    model.set_attn_implementation("eager")
    output = model.backbone(texts(2), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    torch.testing.assert_close(output.attentions[0].sum(dim=-1), torch.ones(2, 2, 6))
    expected = model(input_ids=texts(2)).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(input_ids=texts(2)).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [MD4ForPreTraining, GenMD4ForPreTraining])
def test_learns_a_distribution(kind):
    # Texts of one repeated value: 1/6 of log2 5 bits per token, where the untrained model pays log2 5.
    model = text_model(kind, network={"zero_init": True}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(150):
        ids = torch.randint(5, (32, 1)).expand(-1, 6)
        optimizer.zero_grad()
        model(input_ids=ids).loss.backward()
        optimizer.step()
    bits = model.evidence_bound(input_ids=torch.arange(5)[:, None].expand(-1, 6), num_times=64).bits_per_token.mean()
    assert 0.3 < bits < 0.45 * math.log2(5)  # an estimate, which may fall somewhat below the truth
    ids = model.generate(16, steps=12, seed=0, progress=False).token_ids
    assert (ids == ids[:, :1]).float().mean() > 0.8


def test_config_of_genmd4_refuses_what_is_not_learned():
    for settings in ({"noise_schedule": "linear"}, {"continuous_time": False}, {"power_init": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            GenMD4Config(backbone_config=tiny_network(), **settings)
