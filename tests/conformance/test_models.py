"""Every model is a transformers citizen: one set of tests over the whole catalogue."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from tests.conformance.cases import (
    gradients,
    processor_of,
    saved_processor,
    skip_if_declined,
    skip_unless_pictures,
    tiny_model,
    tiny_teacher,
    training_inputs,
    users_samples,
    variation,
)


def test_example_is_tiny(variant):
    assert sum(p.numel() for p in tiny_model(variant).parameters()) < 200_000


def test_config_survives_a_round_trip(variant, tmp_path):
    config = variant.tiny_config()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is variant.config
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert type(loaded.backbone_config) is type(config.backbone_config)


def test_weights_buffers_and_freezing_survive_a_round_trip(variant, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path)
    loaded, report = variant.pretraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == trainable
    for kind in ("named_parameters", "named_buffers"):
        saved, found = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert saved.keys() == found.keys()
        for name, value in saved.items():
            assert torch.equal(found[name], value), name


def test_auto_classes_resolve(variant, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path)
    processor = processor_of(variant, model.config)
    processor.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is variant.model
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is variant.pretraining
    for auto_class, head in variant.heads.items():
        assert type(auto_class.from_pretrained(tmp_path)) is head
    found = saved_processor(variant, tmp_path)
    assert type(found) is type(processor) and found.to_dict() == processor.to_dict()


def test_one_checkpoint_serves_both_classes(variant, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    ours = model.backbone.state_dict()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, ours[name]), name


def test_loss_comes_first_and_can_be_left_out(variant):
    model = tiny_model(variant)
    inputs = training_inputs(variant, model.config)
    output = model(**inputs)
    assert next(iter(output)) == "loss" and output[0] is output.loss
    assert output.loss.dtype == torch.float32 and output.loss.ndim == 0
    assert output.losses and all(not part.requires_grad for part in output.losses.values())
    assert model(**inputs, return_loss=False).loss is None
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_every_trainable_parameter_gets_a_gradient(variant):
    model = tiny_model(variant).train()
    model(**training_inputs(variant, model.config)).loss.backward()
    without = {
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)
    }
    assert without == set(variant.pretraining.without_gradient)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not frozen & gradients(model).keys()


def test_evaluation_gives_the_same_twice(variant):
    model = tiny_model(variant).eval()
    inputs = variant.inputs(model.config, 3)
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)


def test_training_draws_from_torchs_generator(variant):
    skip_if_declined(variant, "draws")
    inputs = variant.inputs(variant.tiny_config(), 4)

    def loss(seed):
        model = tiny_model(variant).train()  # anew: a forward pass may fill a queue
        torch.manual_seed(seed)
        return model(**inputs).loss

    first = loss(seed=1)
    assert torch.equal(loss(seed=1), first) and not torch.equal(loss(seed=2), first)


def test_hidden_states_and_attentions_are_the_encoders(variant):
    skip_if_declined(variant, "attentions")
    model = tiny_model(variant).eval()
    model.set_attn_implementation("eager")
    inputs = training_inputs(variant, model.config)
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    layers = model.config.backbone_config.num_hidden_layers
    assert len(output.hidden_states) == layers + 1 and len(output.attentions) == layers
    torch.testing.assert_close(output.attentions[0].sum(dim=-1), torch.ones(output.attentions[0].shape[:-1]))


def test_attention_kernels_agree(variant):
    skip_if_declined(variant, "attentions")
    model = tiny_model(variant).eval()
    inputs = training_inputs(variant, model.config)
    model.set_attn_implementation("sdpa")
    expected = model(**inputs).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast(variant, dtype):
    inputs = training_inputs(variant, variant.tiny_config())
    expected = tiny_model(variant).train()(**inputs).loss
    model = tiny_model(variant).train()  # anew: what is drawn and a queue are then the same
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_bfloat16_weights(variant):
    model = tiny_model(variant).to(torch.bfloat16).eval()
    inputs = training_inputs(variant, model.config)
    assert model(**inputs).loss.isfinite()


def test_gradient_checkpointing_changes_nothing(variant):
    skip_if_declined(variant, "gradient_checkpointing")
    model = tiny_model(variant).train()
    inputs = training_inputs(variant, model.config)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model = tiny_model(variant).train()
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model(**inputs).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def assert_one_graph(variant, make_inputs) -> None:
    model = tiny_model(variant).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        torch.manual_seed(step)
        compiled(**make_inputs(model.config, step)).loss.backward()
    assert counter.frame_count == 1


def test_compiles_to_one_graph_without_recompiling(variant):
    assert_one_graph(variant, lambda config, step: training_inputs(variant, config, seed=step))
    torch._dynamo.reset()
    model = tiny_model(variant).eval()
    inputs = training_inputs(variant, model.config)
    torch.testing.assert_close(model(**inputs).loss, torch.compile(model, backend="eager")(**inputs).loss)


def test_compiles_to_one_graph_where_the_model_draws(variant):
    config = variant.tiny_config()
    if variant.inputs(config).keys() == training_inputs(variant, config).keys():
        pytest.skip("Here the model draws nothing that the processor would.")
    assert_one_graph(variant, lambda config, step: variant.inputs(config, 4))


@pytest.mark.parametrize("channels", [1, 4])
def test_rectangles_channels_and_single_samples(variant, channels):
    skip_unless_pictures(variant)
    skip_if_declined(variant, "rectangles")
    size = variant.tiny_config().image_size
    size = size if isinstance(size, int) else size[0]
    config = variation(variant, image_size=[size, size // 2], num_channels=channels)
    model = tiny_model(variant, config).train()
    batch = 2 if "single_samples" in variant.pretraining.declined_checks else 1
    inputs = training_inputs(variant, config, batch)
    assert inputs["pixel_values"].shape[-3:] == (channels, size, size // 2)
    model(**inputs).loss.backward()
    panels = model.eval().pictures(inputs["pixel_values"])
    assert {panel.shape for panel in panels.values()} == {(batch, channels, size, size // 2)}


def test_encoder_starts_from_a_stock_checkpoint(variant, tmp_path):
    model = tiny_model(variant, seed=1)
    model.backbone.save_pretrained(tmp_path)
    started = variant.pretraining.from_backbone(str(tmp_path), **tiny_teacher(model.config))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(started.backbone.state_dict()[name], value), name
    assert started(**training_inputs(variant, started.config)).loss.isfinite()


def test_wrong_inputs_are_named(variant):
    skip_unless_pictures(variant)
    model = tiny_model(variant)
    inputs = variant.inputs(model.config, 2)
    channels = inputs["pixel_values"].shape[-3]
    wrong = torch.cat([inputs["pixel_values"], inputs["pixel_values"]], dim=-3)
    with pytest.raises(ValueError, match=f"{2 * channels} channels"):
        model(**inputs | {"pixel_values": wrong})


def test_processor_makes_what_the_model_takes(variant):
    config = variant.tiny_config()
    processor = processor_of(variant, config)
    batch = processor(**users_samples(variant, processor, 3), training=True, seed=0)
    assert set(batch) <= set(processor.model_input_names)
    if variant.pretraining.uses_classes:  # which a data set knows
        views = batch[tiny_model(variant, config).main_input_name].shape[:2]
        batch["classes"] = torch.arange(views.numel()).view(3, -1)
    assert tiny_model(variant, config)(**batch).loss.isfinite()
