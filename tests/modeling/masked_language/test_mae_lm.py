"""MAE-LM against its reference, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertModel, RobertaConfig, pipeline

from hf_masked import MAELMConfig, MAELMForMaskedLM, MAELMForPreTraining, MAELMModel, TextProcessor
from hf_masked.modeling.masked_language.mae_lm import convert_official_weights, official_config, tiny_config
from hf_masked.modeling.parts.text import example_texts, tiny_bert
from tests.parity.fill import filled, filled_noise

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "mae_lm.json").read_text())["runs"]
ROBERTA = RobertaConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=22,
)


def config_of(reference: dict) -> MAELMConfig:
    """Our config for the reference's arguments."""
    backbone_config = BertConfig(
        vocab_size=reference["vocab"],
        hidden_size=reference["width"],
        num_hidden_layers=reference["layers"],
        num_attention_heads=reference["heads"],
        intermediate_size=reference["ffn"],
        max_position_embeddings=reference["length"],
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    )
    return MAELMConfig(
        backbone_config=backbone_config,
        mask_token_id=reference["vocab"] - 1,
        decoder_num_hidden_layers=reference["decoder_layers"],
        decoder_hidden_size=reference["decoder_width"],
        decoder_num_attention_heads=reference["decoder_heads"],
        decoder_intermediate_size=reference["decoder_ffn"],
    )


def reference_inputs(run: str, stored: dict) -> dict[str, torch.Tensor]:
    vocab, length, lengths = stored["config"]["vocab"], stored["config"]["length"], torch.tensor(stored["lengths"])
    input_ids = 4 + (filled_noise(len(lengths), length, f"{run}.tokens") * (vocab - 5)).long()
    there = torch.arange(length) < lengths[:, None]
    input_ids[:, 0] = 0
    input_ids[torch.arange(len(lengths)), lengths - 1] = 2
    noise = filled_noise(len(lengths), length, f"{run}.noise")
    noise = torch.cat([noise, torch.tensor(stored["rounding"])[:, None]], dim=1)
    return {"input_ids": input_ids.masked_fill(~there, 1), "attention_mask": there.long(), "noise": noise}


@pytest.fixture(params=PARITY)
def reference_run(request):
    """(what is stored, our model with the reference's weights, its output)."""
    stored = PARITY[request.param]
    model = MAELMForPreTraining(config_of(stored["config"])).eval()
    model.load_state_dict(convert_official_weights(filled(stored["parameters"]), model.config))
    return stored, model, model(**reference_inputs(request.param, stored))


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


def test_loss_and_outputs_are_the_references(reference_run):
    stored, _, output = reference_run
    assert output.mask.int().tolist() == stored["mask"]
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    asked = output.mask.gather(1, output.masked_places)
    close(output.logits[asked], stored["logits"])
    for ours, theirs in zip(output.last_hidden_state, stored["latent"], strict=True):
        close(ours[: len(theirs)], theirs)


def test_gradients_are_the_references(reference_run):
    stored, model, output = reference_run
    output.loss.backward()
    ours = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: torch.tensor(value) for name, value in stored["gradient_norms"].items()}
    # The bias of all keys has none but for rounding.
    for name, theirs in convert_official_weights(norms, model.config).items():
        if not name.endswith(("key.bias", "token_type_embeddings.weight")):
            torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-7, msg=name)


def test_config_is_read_from_an_official_checkpoint():
    stored = PARITY["narrow_decoder"]
    config, expected = official_config(filled(stored["parameters"])), config_of(stored["config"])
    heads = {"num_attention_heads": 4}  # which checkpoints do not say
    assert config.backbone_config.to_dict() | heads == expected.backbone_config.to_dict()
    assert config.decoder_config.to_dict() | {"num_attention_heads": 2} == expected.decoder_config.to_dict()
    assert config.mask_token_id == expected.mask_token_id
    with pytest.raises(ValueError, match="relative position bias"):
        official_config({"encoder.sentence_encoder.relative_attention_bias.weight": torch.zeros(64, 12)})


def small_model(backbone_config=None, kind=MAELMForPreTraining, **settings):
    torch.manual_seed(0)
    backbone_config = tiny_bert() if backbone_config is None else backbone_config
    return kind(MAELMConfig(backbone_config=backbone_config, mask_token_id=4, **settings)).eval()


def masked_texts(model, rows: int = 3):
    """Texts of 20, 17, 14, ... tokens, a mask, and both as inputs."""
    torch.manual_seed(1)
    inputs = example_texts(model.config.backbone_config, rows)
    for row in range(rows):
        inputs["attention_mask"][row, 20 - 3 * row :] = 0
    pad = model.config.backbone_config.pad_token_id
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
    mask = (torch.rand(rows, 20) < 0.3) & (inputs["attention_mask"] == 1)
    return inputs | {"bool_masked_pos": mask}


BACKBONES = {"bert": tiny_bert(), "roberta": ROBERTA}


@pytest.mark.parametrize("name", BACKBONES)
def test_encoder_never_sees_what_is_masked(name):
    model = small_model(BACKBONES[name])
    inputs = masked_texts(model)
    seen = []
    model.backbone.embeddings.word_embeddings.register_forward_hook(lambda _, ids, __: seen.append(ids[0]))
    expected = model(**inputs).last_hidden_state
    mask = inputs["bool_masked_pos"]
    others = inputs["input_ids"].masked_fill(mask, 4)
    assert torch.equal(model(**inputs | {"input_ids": others}).last_hidden_state, expected)
    assert not (seen[1] == 4).any() and seen[0].shape[1] == int((~mask & (inputs["attention_mask"] == 1)).sum(1).max())


@pytest.mark.parametrize("name", BACKBONES)
def test_encoder_of_visible_tokens_equals_the_plain_one_whose_attention_hides_the_rest(name):
    model = small_model(BACKBONES[name], kind=MAELMModel)
    inputs = masked_texts(model)
    visible = (inputs["attention_mask"] == 1) & ~inputs["bool_masked_pos"]
    hidden = model(**inputs).last_hidden_state
    whole = model.backbone(input_ids=inputs["input_ids"], attention_mask=visible.long()).last_hidden_state
    for ours, theirs, keep in zip(hidden, whole, visible, strict=True):
        torch.testing.assert_close(ours[: int(keep.sum())], theirs[keep], rtol=1e-5, atol=1e-5)


def test_without_a_mask_the_model_is_the_plain_encoder(tmp_path):
    model = small_model(kind=MAELMModel)
    inputs = masked_texts(model)
    del inputs["bool_masked_pos"]
    model.backbone.save_pretrained(tmp_path)
    plain = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    torch.testing.assert_close(model(**inputs).last_hidden_state, plain(**inputs).last_hidden_state)


def test_nothing_masked_is_no_loss_and_the_decoder_sees_the_encoders_outputs():
    model = small_model()
    inputs = masked_texts(model, rows=1)
    inputs["bool_masked_pos"][:] = False
    given = []
    model.decoder.register_forward_hook(lambda _, arguments, __: given.append(arguments[0]))
    output = model(**inputs)
    assert torch.equal(given[0], output.last_hidden_state)
    assert output.loss == 0 and output.logits.shape[1] == 0 and output.accuracy == 0


def test_decoder_gets_the_mask_tokens_embedding_in_masked_places():
    model = small_model()
    inputs = masked_texts(model)
    given = []
    model.decoder.register_forward_hook(lambda _, arguments, __: given.append(arguments[0]))
    model(**inputs)
    mask_token = model.backbone.embeddings.word_embeddings.weight[4]
    masked = given[0][inputs["bool_masked_pos"]]
    assert torch.equal(masked, mask_token.expand_as(masked))


def test_gradient_reaches_the_mask_token_and_the_encoder_through_the_decoder_alone():
    model = small_model()
    inputs = masked_texts(model)
    model(**inputs).loss.backward()
    assert model.token_embeddings.grad[4].abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.backbone.encoder.parameters())
    model.zero_grad()
    model.decoder.register_forward_pre_hook(lambda _, arguments: (arguments[0].detach(), arguments[1]))
    model(**inputs).loss.backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.backbone.encoder.parameters())


def test_head_is_tied_to_the_embeddings():
    model = small_model()
    inputs = masked_texts(model)
    before = model(**inputs).logits
    unused = 1
    assert not (inputs["input_ids"] == unused).any()
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight[unused] += 1
    changed = (model(**inputs).logits != before).any(dim=(0, 1)).nonzero().flatten()
    assert changed.tolist() == [unused]


def test_texts_alone_and_padded_together_give_the_same():
    model = small_model()
    together = masked_texts(model, rows=2)
    output = model(**together)
    for row in range(2):
        alone = model(**{name: value[row : row + 1] for name, value in together.items()})
        hidden, logits = alone.last_hidden_state[0], alone.logits[0]
        torch.testing.assert_close(output.last_hidden_state[row, : len(hidden)], hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.logits[row, : len(logits)], logits, rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_over_masked_tokens_in_nats():
    model = small_model()
    inputs = masked_texts(model)
    output = model(**inputs)
    asked = output.mask.gather(1, output.masked_places)
    targets = inputs["input_ids"][output.mask]
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits[asked], targets))
    assert output.accuracy == (output.logits[asked].argmax(1) == targets).float().mean()


def test_decoder_has_no_dropout_and_the_papers_four_layers():
    config = MAELMConfig()
    assert config.decoder_config.num_hidden_layers == 4 and config.mask_probability == 0.15
    assert config.decoder_config.hidden_dropout_prob == config.decoder_config.attention_probs_dropout_prob == 0
    decoder = small_model().decoder.train()
    tokens, there = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(decoder(tokens, there), decoder(tokens, there))


def test_masked_language_model_hides_the_mask_tokens_and_fills_them_in(tmp_path):
    model = small_model()
    inputs = masked_texts(model)
    model.save_pretrained(tmp_path)
    filler = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(filler) is MAELMForMaskedLM
    mask = inputs.pop("bool_masked_pos")
    expected = model(**inputs, bool_masked_pos=mask)
    labels = inputs["input_ids"].masked_fill(~mask, -100)
    output = filler(inputs["input_ids"].masked_fill(mask, 4), inputs["attention_mask"], labels=labels)
    torch.testing.assert_close(output.loss, expected.loss)
    tokenizer = TextProcessor().tokenizer
    found = pipeline("fill-mask", model=filler, tokenizer=tokenizer)("a m[MASK]sk", top_k=2)
    assert len(found) == 2 and found[0]["score"] >= found[1]["score"]


def test_special_tokens_can_be_spared():
    config = tiny_config()
    config.mask_special_tokens = False
    processor = TextProcessor(**config.processor_settings())
    batch = processor(["hello", "another text"] * 20, training=True, seed=0)
    special = torch.isin(batch["input_ids"], torch.tensor([0, 2, 3]))
    assert batch["bool_masked_pos"].any() and not (batch["bool_masked_pos"] & special).any()
    model = MAELMForPreTraining(config)
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="does not know the special tokens"):
        model(batch["input_ids"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_token_id": 261}, "mask_token_id is 261"),
        ({"mask_probability": 1.0}, "mask_probability is 1.0"),
        ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers is 0"),
        ({"decoder_hidden_size": 15}, "decoder_hidden_size=15"),
        ({"backbone_config": tiny_bert(is_decoder=True)}, "is_decoder"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MAELMConfig(**{"backbone_config": tiny_bert(), "mask_token_id": 4} | settings)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(2, 33, dtype=torch.long)}, "33 tokens"),
        ({"input_ids": torch.full((2, 5), 300)}, "holds 300"),
        ({"input_ids": torch.zeros(2, 5)}, "expected int64"),
        ({"attention_mask": torch.ones(2, 4)}, "`attention_mask` has shape"),
        ({"bool_masked_pos": torch.zeros(2, 4, dtype=torch.bool)}, "`bool_masked_pos` has shape"),
        ({"bool_masked_pos": torch.zeros(2, 5)}, "expected bool"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**{"input_ids": torch.zeros(2, 5, dtype=torch.long)} | inputs)
