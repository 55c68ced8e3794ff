"""MaskLLM: the paper's claims, and its reference's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

pytest.importorskip("peft", reason="tuners need the extra [peft]")

from peft import get_peft_model

from hf_masked import MaskLLMConfig, harden_masks, initialize_prior, load_npz_masks, read_masks
from hf_masked.modeling.weight_masking import maskllm
from hf_masked.modeling.weight_masking.peft_bridge import logger
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "maskllm.json").read_text())
LLAMA = LlamaConfig(
    vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
IDS = torch.arange(12).view(2, 6)
BATCH = {"input_ids": IDS, "labels": IDS}


class OneLayer(nn.Module):
    """What the reference was run with: 16 inputs, 6 outputs."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(16, 6, bias=False)
        self.dense.load_state_dict({"weight": filled({"dense.weight": (6, 16)})["dense.weight"]})

    def forward(self, inputs):
        return self.dense(inputs)


def one_layer(**settings):
    model = get_peft_model(OneLayer(), MaskLLMConfig(target_modules=["dense"], **settings))
    return model, model.base_model.model.dense


def language_model(**settings):
    torch.manual_seed(0)
    return get_peft_model(LlamaForCausalLM(LLAMA), MaskLLMConfig(**settings))


def stored_noise(logits, tau=1.0, hard=False):
    """`gumbel_softmax` with the noise that the reference was given."""
    noise = -torch.log(-torch.log(filled_noise(*logits.shape, name="gumbel")))
    soft = ((logits + noise) / tau).softmax(dim=-1)
    if not hard:
        return soft
    return torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0) - soft.detach() + soft


def close(ours: torch.Tensor, theirs: list) -> bool:
    theirs = torch.tensor(theirs)
    return bool((ours.detach().flatten() - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("run", PARITY["runs"])
def test_masks_losses_and_gradients_are_those_of_the_reference(run, monkeypatch):
    monkeypatch.setattr(maskllm.F, "gumbel_softmax", stored_noise)
    stored = PARITY["runs"][run]
    model, layer = one_layer(n=stored["n"], hard=stored["hard"], weight_norm_reg=1e-2)
    logits = layer.scores["default"]
    with torch.no_grad():
        logits.copy_(0.005 * filled_pixels(tuple(logits.shape), "gate"))
    model.train().base_model.training_progress = stored["progress"]
    outputs = model(filled_pixels((3, 16), "input"))
    penalty = model.base_model.penalty()
    loss = (outputs * filled_pixels((3, 6), "upstream")).sum()
    (loss if penalty is None else loss + penalty).backward()
    assert close(layer.kept_norm, [stored["norm"]]) and close(layer.mask("default"), stored["mask"])
    assert close(logits.grad, stored["gradient"])
    assert close(layer.mask("default", final=True).float(), stored["evaluation"])
    expected = -1e-2 * (1 - stored["progress"]) * stored["norm"]
    assert penalty is None if stored["progress"] == 1 else float(penalty) == pytest.approx(expected, rel=1e-5)


def test_priors_are_those_of_the_reference():
    _, layer = one_layer(prior="magnitude")
    model, layer = one_layer()
    with torch.no_grad():
        layer.scores["default"].copy_(0.005 * filled_pixels(tuple(layer.scores["default"].shape), "gate"))
    masks = initialize_prior(model, [{"inputs": torch.zeros(1, 16)}], "magnitude")
    assert masks["dense.weight"].int().flatten().tolist() == PARITY["magnitude"]
    assert close(layer.scores["default"], PARITY["with_prior"])
    inputs = filled_pixels((2, 40, 16), "activations") * torch.linspace(0.2, 2, 16)
    masks = initialize_prior(one_layer()[0], [{"inputs": inputs}], "sparsegpt")
    assert masks["dense.weight"].int().flatten().tolist() == PARITY["sparsegpt"]
    assert PARITY["sparsegpt"] != PARITY["magnitude"]


def test_wanda_weighs_inputs_by_their_norm():
    inputs = torch.zeros(2, 16)
    inputs[:, ::4], inputs[:, 1::4] = 10.0, 0.1
    mask = initialize_prior(one_layer()[0], [{"inputs": inputs[:1]}, {"inputs": inputs[1:]}], "wanda")["dense.weight"]
    groups = mask.view(-1, 4)
    assert groups[:, :2].all() and not groups[:, 2:].any()


def test_the_table_of_patterns_is_in_the_papers_order():
    rows = ["".join(str(int(value)) for value in row) for row in MaskLLMConfig().patterns()]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]
    rows = ["".join(str(int(value)) for value in row) for row in MaskLLMConfig(n=1).patterns()]
    assert rows == ["1000", "0100", "0010", "0001"]
    assert MaskLLMConfig(n=4, m=8).patterns().shape == (70, 8)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_each_group_keeps_n_of_m(n, m, progress):
    torch.manual_seed(0)
    model, layer = one_layer(n=n, m=m)
    model.train().base_model.training_progress = layer.progress = progress
    soft = layer.mask("default")
    assert (soft.view(-1, m).sum(dim=1) - n).abs().max() < 1e-5
    assert soft.min() >= 0 and soft.max() <= 1 + 1e-6
    hard = layer.mask("default", final=True)
    assert hard.dtype == torch.bool and (hard.view(-1, m).sum(dim=1) == n).all()


def test_samples_sharpen_until_they_are_the_patterns(monkeypatch):
    monkeypatch.setattr(maskllm.F, "gumbel_softmax", stored_noise)
    cold = {"temperature": (1e-4, 1e-4), "logit_scale": (100.0, 100.0)}
    torch.manual_seed(0)
    soft = one_layer(**cold)[1].train().training_mask("default")
    torch.manual_seed(0)
    assert torch.allclose(soft, one_layer(**cold, hard=True)[1].train().training_mask("default"), atol=1e-4)
    torch.manual_seed(0)
    _, layer = one_layer(temperature=(0.05, 0.05), logit_scale=(1e7, 1e7))
    assert torch.allclose(layer.train().training_mask("default"), layer.units("default").float(), atol=1e-4)


def test_the_recipes_last_samples_are_nearly_patterns():
    torch.manual_seed(0)
    _, layer = one_layer(m=4)
    layer.train().progress = 1.0
    largest = torch.stack([layer.training_mask("default").view(-1, 4).amax(dim=1).mean() for _ in range(20)]).mean()
    assert largest > 0.99
    layer.progress = 0.0
    assert layer.training_mask("default").view(-1, 4).amax(dim=1).mean() < 0.9


def test_a_strong_prior_is_the_mask_and_none_changes_nothing():
    torch.manual_seed(0)
    _, layer = one_layer(prior="magnitude", prior_strength=50.0)
    weight = layer.base_layer.weight.view(-1, 4).abs()
    mask = layer.units("default").view(-1, 4)
    assert (weight.masked_fill(~mask, 9).amin(dim=1) >= weight.masked_fill(mask, 0).amax(dim=1)).all()
    torch.manual_seed(0)
    without = one_layer()[1].scores["default"]
    torch.manual_seed(0)
    assert torch.equal(one_layer(prior="magnitude", prior_strength=0.0)[1].scores["default"], without)


def test_a_prior_shifts_its_pattern_up_and_the_opposite_down():
    _, layer = one_layer()
    before = layer.scores["default"].detach().clone()
    layer.add_prior("default", torch.tensor([True, True, False, False]).repeat(24).view(6, 16))
    shift = (layer.scores["default"] - before) / (3.0 * before.std())
    assert torch.allclose(shift, torch.tensor([1.0, 0, 0, 0, 0, -1.0]).expand(24, 6), atol=1e-5)


def test_only_logits_learn_and_the_norm_raises_patterns_of_large_weights():
    torch.manual_seed(0)
    model, layer = one_layer(weight_norm_reg=1.0)
    model.train()(torch.randn(2, 16))
    model.base_model.penalty().backward()
    assert layer.base_layer.weight.grad is None
    energy = layer.base_layer.weight.detach().square().view(-1, 4) @ MaskLLMConfig().patterns().T
    moves = -layer.scores["default"].grad
    best, worst = energy.argmax(dim=1, keepdim=True), energy.argmin(dim=1, keepdim=True)
    assert (moves.gather(1, best) > moves.gather(1, worst)).all()


def test_half_of_the_decoders_weights_are_zero_after_merging_and_no_others():
    model = language_model()
    dense = {name.replace(".base_layer", ""): p.clone() for name, p in model.get_base_model().named_parameters()}
    masks = read_masks(model)
    merged = model.merge_and_unload()
    assert len(masks) == 2 * 7 and not any("lm_head" in name for name in masks)
    for name, weight in merged.named_parameters():
        assert (weight == 0).float().mean() == (0.5 if name in masks else (dense[name] == 0).float().mean())


def test_one_step_moves_logits_and_warns_without_progress(caplog):
    model = language_model(weight_norm_reg=10.0).train()
    type(logger).warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        loss = model(**BATCH).loss
    assert "MaskCallback" in caplog.text
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.eval()(**BATCH).loss > loss + 1, "the reward is one of training"


def test_transposed_layers_are_grouped_by_their_inputs():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    weight = base.transformer.h[0].mlp.c_fc.weight.detach().clone()  # (in, out)
    model = get_peft_model(base, MaskLLMConfig(prior="magnitude", prior_strength=99.0))
    merged = model.merge_and_unload()
    kept = (merged.transformer.h[0].mlp.c_fc.weight != 0).T.reshape(-1, 4)
    assert (kept.sum(dim=1) == 2).all()
    largest = weight.T.reshape(-1, 4).abs().topk(2, dim=1).indices
    assert kept.gather(1, largest).all()


def test_published_archives_are_read(tmp_path):
    model = language_model()
    torch.manual_seed(5)
    masks = {
        name: maskllm.keep_largest(torch.rand(mask.shape), MaskLLMConfig()) for name, mask in read_masks(model).items()
    }
    archive = {f"{name}.mask": np.packbits(mask.numpy()) for name, mask in masks.items()}
    np.savez_compressed(tmp_path / "masks.npz", **archive)
    for hardened in (False, True):
        model = language_model()
        if hardened:
            harden_masks(model)
        load_npz_masks(model, tmp_path / "masks.npz")
        assert all(torch.equal(mask, masks[name]) for name, mask in read_masks(model).items())
    first = next(iter(archive))
    np.savez_compressed(tmp_path / "short.npz", **archive | {first: archive[first][:3]})
    with pytest.raises(ValueError, match="3 bytes"):
        load_npz_masks(language_model(), tmp_path / "short.npz")
    np.savez_compressed(tmp_path / "few.npz", **{first: archive[first]})
    with pytest.raises(ValueError, match="has no"):
        load_npz_masks(language_model(), tmp_path / "few.npz")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 4}, "n=4 of m=4"),
        ({"n": 8, "m": 16}, "12870 patterns"),
        ({"prior": "best"}, "prior is 'best'"),
        ({"temperature": (4.0, 0.0)}, "temperature is"),
        ({"logit_scale": (1.0,)}, "logit_scale is"),
        ({"weight_norm_reg": -1}, "weight_norm_reg is -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskLLMConfig(**settings)


def test_wrong_uses_are_named():
    with pytest.raises(ValueError, match="cannot be cut into groups of m=3"):
        one_layer(n=1, m=3)
    with pytest.raises(ValueError, match="criterion is 'luck'"):
        initialize_prior(one_layer()[0], [], "luck")
    with pytest.raises(ValueError, match="saw no input"):
        initialize_prior(one_layer()[0], [], "wanda")
    model, _ = one_layer()
    harden_masks(model)
    with pytest.raises(ValueError, match="no MaskLLM logits"):
        initialize_prior(model, [{"inputs": torch.zeros(1, 16)}])
