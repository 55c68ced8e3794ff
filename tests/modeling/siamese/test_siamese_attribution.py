"""The exact mode of Siamese attribution: its model, and what the conformance suite asks of models of pictures."""

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    BertConfig,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    MPNetConfig,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
)

from hf_masked import (
    ReferenceShiftedConfig,
    ReferenceShiftedEncoder,
    ReferenceShiftedForSimilarity,
    get_variant,
)
from hf_masked.evaluation.attribution import SiameseAttributor
from hf_masked.modeling.siamese.siamese_attribution import example_inputs, reference_tokens, tiny_config
from hf_masked.training.cli import main as program
from tests.parity.fill import filled

ROOT = Path(__file__).parents[3]
PARITY = json.loads((ROOT / "tests" / "parity" / "siamese_attribution.json").read_text())

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
BACKBONES = {
    "bert": BertConfig(**SIZE),
    "roberta": RobertaConfig(**SIZE),
    "xlm-roberta": XLMRobertaConfig(**SIZE),
    "mpnet": MPNetConfig(**SIZE),
    "distilbert": DistilBertConfig(**DISTIL),
}


def model_of(seed: int = 0, **settings) -> ReferenceShiftedForSimilarity:
    torch.manual_seed(seed)
    config = tiny_config().to_dict() | settings
    return ReferenceShiftedForSimilarity(ReferenceShiftedConfig(**config))


def inputs_of(model, batch: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return example_inputs(model.config, batch)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the reference implementation ---


@pytest.mark.parametrize("similarity", PARITY["training"])
def test_loss_and_gradients_are_the_references(similarity):
    stored = PARITY["training"][similarity]
    backbone = RobertaModel(RobertaConfig(**stored["config"]), add_pooling_layer=False)
    backbone.load_state_dict(filled({n: tuple(s) for n, s in stored["parameters"].items()}), strict=False)
    model = ReferenceShiftedForSimilarity.from_backbone(backbone, similarity=similarity).double().eval()
    assert model.config.reference_ids == [0, 1, 2], "those of RoBERTa's config"
    texts = [torch.tensor(stored[f"input_ids_{name}"]) for name in "ab"]
    # The reference encodes the two texts in batches of their own; here the shorter one is padded.
    input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    output = model(input_ids[None], mask[None], labels=torch.tensor([stored["label"]], dtype=torch.float64))
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    output.loss.backward()
    found = {name.removeprefix("backbone."): gradient.norm().item() for name, gradient in gradients(model).items()}
    assert found.keys() == stored["gradient_norms"].keys()
    largest = max(stored["gradient_norms"].values())
    for name, norm in stored["gradient_norms"].items():
        assert found[name] == pytest.approx(norm, rel=1e-5, abs=1e-6 * largest), name


# --- the shift ---


def test_reference_tokens_follow_the_text():
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    expected = [[7, 8, 8, 9, 8], [8, 7, 8, 8, 9], [7, 9, 8, 8, 8], [7, 8, 8, 8, 8]]
    assert reference_tokens(mask, (7, 8, 9)).tolist() == expected


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_reference_is_embedded_as_exactly_zero(pooling):
    model = ReferenceShiftedEncoder(model_of(pooling=pooling).config).eval()
    first, filler, last = model.config.reference_ids
    embedding = model(torch.tensor([[first, filler, filler, filler, last]])).pooler_output
    assert torch.equal(embedding, torch.zeros_like(embedding))
    assert model(torch.tensor([[first, 9, filler, filler, last]])).pooler_output.abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_embedding_does_not_depend_on_the_batch(side):
    # The reference implementation's reference is as long as the longest text of the batch.
    model = ReferenceShiftedEncoder(tiny_config()).eval()
    text, padding = torch.tensor([[1, 9, 20, 5, 2]]), torch.zeros(1, 3, dtype=torch.int64)
    ids, mask = (text, padding), (torch.ones_like(text), padding)
    positions = torch.arange(5)[None]
    if side == "left":
        ids, mask = ids[::-1], mask[::-1]
        positions = torch.cat([padding, positions], dim=1).repeat(2, 1)
    else:
        positions = torch.cat([positions, padding], dim=1).repeat(2, 1)
    padded = model(torch.cat(ids, dim=1), torch.cat(mask, dim=1), position_ids=positions)
    torch.testing.assert_close(padded.pooler_output, model(text).pooler_output)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_attributions_of_every_kind_of_backbone_add_up_to_the_score(kind, similarity):
    torch.manual_seed(0)
    config = ReferenceShiftedConfig(backbone_config=BACKBONES[kind], reference_ids=(3, 1, 2), similarity=similarity)
    model = ReferenceShiftedForSimilarity(config).double().eval()
    a, b = [3, 20, 31, 9, 2], [3, 44, 9, 2]
    found = SiameseAttributor(model, num_steps=100).explain(a, b)
    assert list(found.reference_terms.values()) == [0, 0, 0]
    assert found.attributions.sum().item() == pytest.approx(found.score, rel=1e-3)
    pair = torch.tensor([[a, [*b, 1]]])
    mask = torch.tensor([[[1] * 5, [1, 1, 1, 1, 0]]])
    assert found.score == pytest.approx(model(pair, mask).logits.item(), rel=1e-5)


def test_similarity_is_that_of_the_encoders_embeddings():
    model = model_of().eval()
    inputs = inputs_of(model)
    output = model(**inputs)
    encoder = ReferenceShiftedEncoder(model.config).eval()
    encoder.load_state_dict(model.state_dict())
    for text in range(2):
        found = encoder(inputs["input_ids"][:, text], inputs["attention_mask"][:, text])
        torch.testing.assert_close(found.pooler_output, output.embeddings[:, text])
    expected = torch.cosine_similarity(*output.embeddings.unbind(dim=1))
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, (expected - inputs["labels"]).square().mean())


def test_token_types_reach_bert():
    model = model_of().eval()
    inputs = inputs_of(model)
    zeros = torch.zeros_like(inputs["input_ids"])
    torch.testing.assert_close(model(**inputs, token_type_ids=zeros).loss, model(**inputs).loss)
    # They move the reference as well, so that what is the same for all tokens cancels to first order.
    assert not torch.equal(model(**inputs, token_type_ids=zeros + 1).logits, model(**inputs).logits)


# --- configs ---


def test_reference_ids_are_those_of_the_backbone_or_must_be_given():
    assert ReferenceShiftedConfig(backbone_config=RobertaConfig()).reference_ids == [0, 1, 2]
    assert ReferenceShiftedConfig(backbone_config=MPNetConfig()).reference_ids == [0, 1, 2]
    assert ReferenceShiftedConfig().reference_ids == [101, 0, 102]
    with pytest.raises(ValueError, match="those of the tokenizer"):
        ReferenceShiftedConfig(backbone_config=BertConfig())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reference_ids": (1, 0)}, "expected three ids"),
        ({"reference_ids": (1, 0, 64)}, "below vocab_size=64"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"similarity": "euclid"}, "similarity is 'euclid'"),
        ({"backbone_config": {"model_type": "vit"}}, "not 'vit'"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        model_of(**settings)


def test_wrong_inputs_are_named():
    model = model_of()
    for shape in ((2, 8), (2, 3, 8)):
        with pytest.raises(ValueError, match=r"expected \(batch, 2, tokens\)"):
            model(torch.ones(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected \(batch, tokens\)"):
        ReferenceShiftedEncoder(model.config)(torch.ones(2, 2, 8, dtype=torch.int64))


# --- a citizen of transformers: the conformance suite's list, for texts ---


def test_catalogue_has_it_as_a_procedure():
    variant = get_variant("siamese_attribution")
    assert variant.kind == "procedure" and variant.family == "siamese" and variant.config.modality == "text"
    card = (ROOT / "model_cards" / "siamese_attribution.md").read_text()
    assert variant.config.paper_title in card and variant.config.arxiv_id in card


def test_train_py_says_where_it_is_explained(tmp_path, capsys):
    flags = ["--method", "siamese_attribution", "--dataset_name", "digits", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        program([*flags, "--use_cpu", "true", "--bf16", "false"])
    line = capsys.readouterr().err
    assert "siamese_attribution is a procedure" in line and "model_cards/siamese_attribution.md" in line


def test_config_and_weights_survive_a_round_trip(tmp_path):
    model = model_of()
    assert sum(p.numel() for p in model.parameters()) < 200_000
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ReferenceShiftedConfig and config.to_diff_dict() == model.config.to_diff_dict()
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    encoder, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is ReferenceShiftedForSimilarity and type(encoder) is ReferenceShiftedEncoder
    assert not any(report.values())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(encoder.state_dict()[name], value), name


def test_backbone_is_a_plain_encoder_and_may_be_the_start(tmp_path):
    model = model_of(seed=1)
    model.backbone.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)) is BertModel
    started = ReferenceShiftedForSimilarity.from_backbone(str(tmp_path), reference_ids=(1, 0, 2))
    for name, value in model.state_dict().items():
        assert torch.equal(started.state_dict()[name], value), name


def test_every_parameter_that_has_a_say_gets_a_gradient():
    model = model_of().train()
    model(**inputs_of(model)).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0} == set(
        model.without_gradient
    )


def test_output_follows_the_package():
    model = model_of()
    inputs = inputs_of(model)
    output = model(**inputs)
    assert next(iter(output)) == "loss" and output.loss.dtype == torch.float32
    assert not output.losses["similarity"].requires_grad
    assert model(**inputs, return_loss=False).loss is None
    assert isinstance(model(**inputs, return_dict=False), tuple)
    inputs.pop("labels")
    assert model(**inputs).loss is None and model(**inputs).logits.shape == (4,)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.attentions[0].shape == (4, 2, 8, 8)


def test_attention_kernels_and_checkpointing_change_nothing():
    model = model_of()
    inputs = inputs_of(model)
    model.eval().set_attn_implementation("eager")
    eager = model(**inputs).loss
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**inputs).loss, eager, rtol=1e-5, atol=1e-6)
    model.train()(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = model_of().eval()
    inputs = inputs_of(model)
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32 and all(gradient.isfinite().all() for gradient in gradients(model).values())
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    assert model.to(torch.bfloat16)(**inputs).loss.isfinite()


def test_compiles_to_one_graph_without_recompiling():
    torch._dynamo.reset()
    model, counter = model_of().train(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        compiled(**inputs_of(model, seed=step)).loss.backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def samples_of(model, count: int = 16) -> list[dict[str, torch.Tensor]]:
    inputs = inputs_of(model, batch=count)
    return [{name: value[i] for name, value in inputs.items()} for i in range(count)]


def trainer_of(output: Path, **settings) -> Trainer:
    model = model_of()
    defaults = {
        "use_cpu": True,
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    args = TrainingArguments(str(output), disable_tqdm=True, learning_rate=1e-3, **defaults | settings)
    samples = samples_of(model)
    return Trainer(model=model, args=args, train_dataset=samples, eval_dataset=samples)


def test_plain_trainer_trains_evaluates_and_resumes(tmp_path):
    trainer = trainer_of(tmp_path / "whole")
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    resumed = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_training_teaches_scores_and_attributions_still_add_up(tmp_path):
    # The score of a pair is whether the texts share their second token.
    torch.manual_seed(0)
    ids = torch.randint(10, 64, (256, 2, 5))
    ids[:, :, 0], ids[:, :, -1] = 1, 2
    labels = (torch.arange(256) % 2).float()
    ids[labels == 1, 1, 1] = ids[labels == 1, 0, 1]
    samples = [{"input_ids": pair, "labels": label} for pair, label in zip(ids, labels, strict=True)]
    model = model_of()
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=150, per_device_train_batch_size=32, learning_rate=3e-3,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    before = Trainer(model=model, args=args, eval_dataset=samples).evaluate()["eval_loss"]
    trainer = Trainer(model=model, args=args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    found = SiameseAttributor(model, num_steps=100).explain(*ids[1])
    assert found.attributions.sum().item() == pytest.approx(found.score, abs=0.01)
    assert (found.top_pairs(1)[0].index_a, found.top_pairs(1)[0].index_b) == (1, 1)


def test_checkpoint_with_a_tokenizer_is_explained(tmp_path):
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "a", "cat", "dog", "sat", "ran"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    model = model_of()
    model.save_pretrained(tmp_path)
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    found = SiameseAttributor.from_pretrained(str(tmp_path), num_steps=50).explain("a cat sat", "a dog ran")
    assert found.tokens_a == ["[CLS]", "a", "cat", "sat", "[SEP]"] and found.special_a.sum() == 2
    assert list(found.reference_terms.values()) == [0, 0, 0]
