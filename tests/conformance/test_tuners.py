"""What every tuner does, through PEFT's own functions: wrap, train, save, load, switch, merge."""

import copy
import warnings

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_masked.modeling.registry import CATALOGUE, load_later_families

pytest.importorskip("peft", reason="tuners need the extra [peft]")
load_later_families()

from peft import PeftModel, get_peft_model  # noqa: E402

from hf_masked.modeling.weight_masking.peft_bridge import TunerLayer, WeightMaskLayer, harden_masks  # noqa: E402
from hf_masked.training.mask_callbacks import MaskCallback  # noqa: E402

TUNERS = [variant for variant in CATALOGUE.values() if variant.kind == "tuner"]
BASE = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture(params=TUNERS, ids=[variant.name for variant in TUNERS])
def tuner(request):
    return request.param


def base_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BASE).eval()


def samples(count: int = 16, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] > 20)} for row in ids]


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    rows = samples(4, seed)
    return {
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def wrapped(tuner, seed: int = 1, **settings):
    torch.manual_seed(seed)
    config = tuner.tiny_config()
    for name, value in settings.items():
        setattr(config, name, value)
    model = get_peft_model(base_model(), config)
    if tuner.initialize:
        tuner.initialize(model, [batch()])
    return model


def moved(model, seed: int = 2):
    """The active adapter with other values, as after training, without the training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def final(model):
    """The adapter as it is saved after training."""
    if any(isinstance(module, WeightMaskLayer) for module in model.modules()):
        harden_masks(model)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=batch()["input_ids"]).logits


def without_adapter(model) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model)


def base_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.get_base_model().named_parameters() if not p.requires_grad}


def trainer_of(model, folder, callbacks, **settings) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 4, "save_strategy": "no"} | settings,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=samples(), callbacks=callbacks)


def callbacks_of(model) -> list:
    return [MaskCallback()] if any(isinstance(module, WeightMaskLayer) for module in model.modules()) else []


def test_only_the_adapter_trains_with_the_ordinary_trainer(tuner, tmp_path):
    model = wrapped(tuner)
    before, adapters = base_weights(model), {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert adapters and all(tuner.config.tuner_name in name for name in adapters)
    trainer_of(model, tmp_path, []).train()
    after = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in adapters.items() if value.numel())


def test_every_trained_tensor_gets_a_gradient(tuner):
    model = wrapped(tuner).train()
    model(**batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None or not parameter.numel(), name


def test_a_resumed_run_ends_where_the_whole_one_does(tuner, tmp_path):
    whole = wrapped(tuner)
    trainer_of(whole, tmp_path / "a", callbacks_of(whole), save_strategy="steps", save_steps=2).train()
    resumed = wrapped(tuner)
    trainer = trainer_of(resumed, tmp_path / "b", callbacks_of(resumed))
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    mine, theirs = whole.state_dict(), resumed.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_saved_are_only_the_masks_tensors_and_loaded_they_give_the_same(tuner, tmp_path):
    model = final(moved(wrapped(tuner)))
    model.save_pretrained(tmp_path)
    names = (*tuner.layer.adapter_layer_names, *tuner.layer.other_param_names)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    assert tensors and all(name.rsplit(".", 1)[-1] in names for name in tensors)
    if issubclass(tuner.layer, WeightMaskLayer):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, WeightMaskLayer)}
        weights = sum(layer.base_layer.weight.numel() for layer in layers.values())
        assert all(tensor.dtype == torch.uint8 for tensor in tensors.values())
        assert sum(tensor.numel() for tensor in tensors.values()) == weights // 8
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_training_goes_on_from_what_was_saved_in_the_middle(tuner, tmp_path):
    model = moved(wrapped(tuner))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    trained = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in trained.items())
    # And the same file serves inference.
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))


def test_two_adapters_share_a_base_and_are_switched(tuner, tmp_path):
    outputs = {}
    for name, seed in (("first", 5), ("second", 6)):
        model = final(moved(wrapped(tuner, seed), seed))
        model.save_pretrained(tmp_path / name)
        outputs[name] = logits(model)
    assert not torch.equal(outputs["first"], outputs["second"])
    base = base_model()
    alone = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model), outputs[name])
    with model.disable_adapter():
        assert torch.equal(logits(model), alone)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(logits(model), outputs["second"])


def test_a_second_adapter_is_trained_beside_the_first(tuner):
    model = moved(wrapped(tuner))
    first = logits(model)
    model.add_adapter("second", tuner.tiny_config())
    model.set_adapter("second")
    if tuner.initialize:
        tuner.initialize(model, [batch(3)])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith(".second") for name in trained)
    moved(model, 9)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_without_the_adapter_it_is_the_base(tuner):
    model = moved(wrapped(tuner))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model()))
    assert not torch.equal(logits(model), logits(base_model()))


def test_merging_changes_nothing_but_the_kind_of_model(tuner):
    model = moved(wrapped(tuner))
    expected = logits(model)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert (
        type(merged) is BertForSequenceClassification and not merged._forward_hooks and not merged._forward_pre_hooks
    )
    assert not any(isinstance(module, TunerLayer) for module in merged.modules())
    assert torch.allclose(logits(merged), expected, atol=1e-6)


def test_unmerging_restores_the_base_or_says_why_not(tuner):
    model = moved(wrapped(tuner))
    expected, base = logits(model), logits(base_model())
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-6)
    if issubclass(tuner.layer, WeightMaskLayer):
        for undo in (model.unmerge_adapter, lambda: without_adapter(model)):
            with pytest.raises(RuntimeError, match="set to zero is lost"):
                undo()
    else:
        model.unmerge_adapter()
        assert torch.equal(logits(model.unload()), base)


def test_weights_that_are_not_finite_are_not_merged(tuner):
    model = moved(wrapped(tuner))
    layer = next(m for m in model.modules() if isinstance(m, TunerLayer) and m.changed_parameters(["default"]))
    with torch.no_grad():
        next(layer.base_layer.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)


def test_half_precision(tuner):
    model = moved(wrapped(tuner))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**batch()).loss
    loss.backward()
    assert loss.isfinite()
    torch.manual_seed(1)
    low = get_peft_model(base_model().to(torch.bfloat16), tuner.tiny_config())
    if tuner.initialize:
        tuner.initialize(low, [batch()])
    assert all(p.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    low.train()(**batch()).loss.backward()


def test_compiles_as_one_graph(tuner):
    model = moved(wrapped(tuner)).eval()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=batch()["input_ids"]).logits, logits(model), atol=1e-6)


def test_gradient_checkpointing_changes_nothing(tuner):
    found = []
    for checkpointing in (False, True):
        model = moved(wrapped(tuner)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        model(**batch()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.numel()})
    assert all(torch.allclose(found[1][name], gradient, atol=1e-7) for name, gradient in found[0].items())


def test_settings_survive_a_round_trip(tuner, tmp_path):
    config = tuner.tiny_config()
    config.save_pretrained(tmp_path)
    assert tuner.config.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_modules_that_are_not_there_are_named(tuner):
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(base_model(), tuner.config(target_modules=["nowhere"]))
