"""FISH Mask: the paper's claims, and its reference's numbers."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import ModelOutput

pytest.importorskip("peft", reason="tuners need the extra [peft]")

from peft import PeftModel, get_peft_model

from hf_masked import FishMaskConfig, compute_fisher, deal_topk, initialize_fish_mask, select_topk
from hf_masked.modeling.weight_masking.fish_mask import FishMaskLayer
from hf_masked.training.mask_callbacks import FishGradientCallback
from tests.modeling.weight_masking.small_model import examples, filled_model, one_batch

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "fish_mask.json").read_text())


def wrapped(**settings):
    settings = {"keep_ratio": 0.4, "modules_to_save": ["classifier"], "num_samples": 8} | settings
    model = get_peft_model(filled_model(), FishMaskConfig(**settings))
    return model, initialize_fish_mask(model, [one_batch()])


@pytest.mark.parametrize("run", ["label-square", "label-absolute", "expect-square"])
def test_scores_are_those_of_the_reference(run):
    fisher = {"label": "empirical", "expect": "expected"}[run.split("-")[0]]
    scores = compute_fisher(filled_model(), [one_batch()], 8, fisher, run.split("-")[1])
    for name, expected in PARITY["runs"][run]["scores"].items():
        expected = torch.tensor(expected)
        assert (scores[name].flatten() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("run", ["label-square", "label-absolute", "expect-square"])
def test_the_same_weights_are_chosen_as_in_the_reference(run):
    fisher = {"label": "empirical", "expect": "expected"}[run.split("-")[0]]
    model, masks = wrapped(fisher=fisher, score=run.split("-")[1])
    chosen = PARITY["runs"][run]["chosen"]
    assert masks.keys() == {name for name in chosen if "classifier" not in name}
    assert all(mask.flatten().nonzero().flatten().tolist() == chosen[name] for name, mask in masks.items())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == int(0.4 * 211)


def test_masks_are_dealt_as_in_the_reference():
    model = filled_model()
    scores = compute_fisher(model, [one_batch()], 8)
    scores = {name: score for name, score in scores.items() if "classifier" not in name}
    masks = deal_topk(scores, int(0.25 * 211) - 27, 2)
    for mask, expected in zip(masks, PARITY["runs"]["dealt"], strict=True):
        assert all(m.flatten().nonzero().flatten().tolist() == expected[name] for name, m in mask.items())
    assert not any((masks[0][name] & masks[1][name]).any() for name in scores)
    best = select_topk(scores, 2 * (int(0.25 * 211) - 27))
    assert all(torch.equal(masks[0][name] | masks[1][name], best[name]) for name in scores)


class Softmax(nn.Module):
    """A linear softmax classifier, whose information is known in closed form."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, inputs, labels=None):
        logits = self.linear(inputs)
        return ModelOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def test_closed_forms():
    model, x, y = Softmax(), torch.randn(1, 4), torch.tensor([2])
    p = model(x).logits.softmax(-1)[0]
    error = (p - F.one_hot(y[0], 3)).outer(x[0])
    batch = {"inputs": x, "labels": y}
    assert torch.allclose(compute_fisher(model, [batch])["linear.weight"], error.square(), atol=1e-7)
    expected = sum(p[c] * (p - F.one_hot(torch.tensor(c), 3)).outer(x[0]).square() for c in range(3))
    assert torch.allclose(compute_fisher(model, [batch], fisher="expected")["linear.weight"], expected, atol=1e-7)


def test_labels_drawn_from_the_model_make_both_kinds_agree():
    model, x = Softmax(), torch.randn(1, 4)
    p = model(x).logits.softmax(-1)[0]
    expected = compute_fisher(model, [{"inputs": x}], fisher="expected")["linear.weight"]
    of_labels = [
        compute_fisher(model, [{"inputs": x, "labels": torch.tensor([c])}])["linear.weight"] for c in range(3)
    ]
    assert torch.allclose(sum(share * found for share, found in zip(p, of_labels, strict=True)), expected, atol=1e-7)


def test_examples_count_one_by_one_in_any_order():
    model, batch = filled_model(), one_batch()
    whole = compute_fisher(model, [batch])
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    shuffled = compute_fisher(model, [{name: value[order] for name, value in batch.items()}])
    singles = compute_fisher(model, [{name: value[i : i + 1] for name, value in batch.items()} for i in range(8)])
    model(**batch).loss.backward()
    for name, score in whole.items():
        assert torch.allclose(score, shuffled[name], rtol=1e-4) and torch.allclose(score, singles[name], rtol=1e-4)
    of_the_mean = {name: p.grad.square() for name, p in model.named_parameters()}
    best = [select_topk(scores, 40) for scores in (whole, of_the_mean)]
    assert any(not torch.equal(best[0][name], best[1][name]) for name in whole)
    assert compute_fisher(model, [batch], num_samples=3)["norm.bias"].sum() < whole["norm.bias"].sum()


def test_exactly_so_many_are_chosen_and_of_equals_the_first():
    masks = select_topk({"a": torch.tensor([1.0, 3.0, 1.0]), "b": torch.tensor([[1.0, 2.0]])}, 3)
    assert masks["a"].tolist() == [True, True, False] and masks["b"].tolist() == [[False, True]]
    with pytest.raises(ValueError, match="cannot be chosen"):
        select_topk({"a": torch.zeros(3)}, 4)


def trained(model, folder, steps: int = 6, weight_decay: float = 0.0, optimizer: str = "sgd", callbacks=(), lr=0.1):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=lr, weight_decay=weight_decay,
        optim=optimizer, lr_scheduler_type="constant", report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=examples(), callbacks=list(callbacks)).train()
    return model


def test_what_is_not_chosen_keeps_its_value_to_the_bit(tmp_path):
    model, masks = wrapped()
    merged = trained(model, tmp_path, weight_decay=0.1, optimizer="adamw_torch").merge_and_unload()
    before = dict(filled_model().named_parameters())
    after = dict(merged.named_parameters())
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        assert not mask.any() or not torch.equal(after[name][mask], before[name][mask])


def test_masked_gradients_and_differences_learn_the_same(tmp_path):
    model, masks = wrapped()
    merged = trained(model, tmp_path).merge_and_unload()
    callback = FishGradientCallback([one_batch()], keep_ratio=0.4)
    other = trained(filled_model(), tmp_path, callbacks=[callback])
    assert all(torch.equal(callback.masks[name], mask) for name, mask in masks.items())
    theirs = dict(other.named_parameters())
    assert all(torch.allclose(w, theirs[name], atol=1e-6) for name, w in merged.named_parameters())
    assert all(w.grad is None or not w._backward_hooks for w in other.parameters())


def test_all_kept_is_ordinary_fine_tuning_and_none_is_the_head_alone(tmp_path):
    model, _ = wrapped(keep_ratio=1.0)
    merged = dict(trained(model, tmp_path).merge_and_unload().named_parameters())
    full = dict(trained(filled_model(), tmp_path).named_parameters())
    assert all(torch.allclose(merged[name], weight, atol=1e-6) for name, weight in full.items())
    untouched = get_peft_model(filled_model(), FishMaskConfig(modules_to_save=["classifier"]))
    assert sum(p.numel() for p in untouched.parameters() if p.requires_grad) == 27


def test_masks_are_drawn_anew_and_weight_decay_is_refused(tmp_path):
    callback = FishGradientCallback([one_batch()], keep_ratio=0.3, refresh_every=2)
    masks = []
    callback.choose, choose = lambda model: (choose(model), masks.append(callback.masks)), callback.choose
    trained(filled_model(), tmp_path, callbacks=[callback], lr=0.5)
    assert len(masks) == 3 and any(not torch.equal(masks[0][name], masks[2][name]) for name in masks[0])
    with pytest.raises(ValueError, match="weight_decay"):
        trained(filled_model(), tmp_path, weight_decay=0.1, callbacks=[FishGradientCallback([one_batch()], 0.3)])


@pytest.mark.parametrize("selection", ["random", "magnitude", "bias"])
def test_other_selections(selection):
    model = get_peft_model(filled_model(), FishMaskConfig(selection=selection, keep_ratio=0.2))
    masks = initialize_fish_mask(model)
    chosen = sum(int(mask.sum()) for mask in masks.values())
    assert chosen == (8 + 8 + 3 if selection == "bias" else int(0.2 * 211))
    if selection == "bias":
        assert all(mask.all() == name.endswith("bias") for name, mask in masks.items())


def test_the_file_is_eight_bytes_for_each_weight(tmp_path):
    model, masks = wrapped(modules_to_save=None)
    model.save_pretrained(tmp_path)
    chosen = sum(int(mask.sum()) for mask in masks.values())
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert chosen == int(0.4 * 211) and size - header - 8 == 8 * chosen
    loaded = PeftModel.from_pretrained(filled_model(), tmp_path)
    assert torch.equal(loaded(**one_batch()).logits, model(**one_batch()).logits)


def test_unmerging_is_exact():
    model, _ = wrapped(modules_to_save=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.37 * parameter.requires_grad
    layers = [module for module in model.modules() if isinstance(module, FishMaskLayer)]
    before = [copy.deepcopy(layer.base_layer.state_dict()) for layer in layers]
    model.merge_adapter()
    pairs = list(zip(before, layers, strict=True))
    assert any(not torch.equal(old["weight"], layer.base_layer.weight) for old, layer in pairs)
    model.unmerge_adapter()
    for old, layer in pairs:
        assert all(torch.equal(weight, layer.base_layer.state_dict()[name]) for name, weight in old.items())


def test_several_adapters_at_once_add_their_differences():
    model, _ = wrapped(modules_to_save=None)
    model.add_adapter("second", FishMaskConfig(keep_ratio=0.2))
    initialize_fish_mask(model, [one_batch()], "second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * ("fish_mask_values" in name)
    model.base_model.set_adapter(["default", "second"])
    together = model(**one_batch()).logits
    base = model.merge_and_unload(adapter_names=["default", "second"])
    assert torch.allclose(base(**one_batch()).logits, together, atol=1e-6)


def test_tied_weights_have_one_difference():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    inputs = {"input_ids": torch.randint(0, 20, (2, 6))}
    inputs["labels"] = inputs["input_ids"]
    model = get_peft_model(base, FishMaskConfig(keep_ratio=0.2, num_samples=2))
    masks = initialize_fish_mask(model, [inputs])
    total = sum(p.numel() for n, p in base.named_parameters() if "fish_mask" not in n)
    assert "transformer.wte.weight" in masks and "lm_head.weight" not in masks
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.2 * total)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.5 * ("fish_mask_values" in name)
    expected = model.eval()(**inputs).logits
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"fisher": "true"}, "fisher is 'true'"),
        ({"score": "cubic"}, "score is 'cubic'"),
        ({"selection": "lucky"}, "selection is 'lucky'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FishMaskConfig(**settings)


def test_wrong_uses_are_named():
    with pytest.raises(ValueError, match="nothing is left for the backbone"):
        wrapped(keep_ratio=0.1)
    with pytest.raises(ValueError, match="needs data"):
        initialize_fish_mask(get_peft_model(filled_model(), FishMaskConfig(keep_ratio=0.5)))
    with pytest.raises(ValueError, match="gave no loss"):
        compute_fisher(filled_model(), [{"input_ids": one_batch()["input_ids"]}])
    with pytest.raises(ValueError, match="keep_ratio is 2"):
        FishGradientCallback([], keep_ratio=2)
    with pytest.raises(ValueError, match="true"):
        FishGradientCallback([], fisher="true")
