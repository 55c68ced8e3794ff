"""The triplet network, SimCLR and BYOL on texts: the conformance suite's checks on small BERTs, and their own."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel, DistilBertConfig, ElectraConfig, RobertaConfig

from hf_masked import (
    BYOLConfig,
    BYOLForPreTraining,
    MultiViewImageProcessor,
    SimCLRConfig,
    SimCLRForPreTraining,
    TextProcessor,
    TripletConfig,
    TripletForPreTraining,
)
from hf_masked.modeling.parts.text import TEXT_BACKBONES, example_texts, tiny_bert
from hf_masked.modeling.registry import get_variant
from hf_masked.training.export import export_encoder
from tests.conformance import test_models as models
from tests.conformance import test_training as training
from tests.conformance.cases import tiny_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
POSITIONS = {"vocab_size": 261, "max_position_embeddings": 36}
BACKBONES = {
    "bert": tiny_bert(),
    "roberta": RobertaConfig(**SIZES, **POSITIONS),
    "distilbert": DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, **POSITIONS),
    "electra": ElectraConfig(embedding_size=32, **SIZES, **POSITIONS),
}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**settings):
    return tiny_bert(num_hidden_layers=1, max_position_embeddings=40, **settings)


# The same methods as in the catalogue, around encoders of texts.
VARIANTS = {
    "triplet": replace(
        get_variant("triplet"), tiny_config=lambda: TripletConfig(backbone_config=bert(), embedding_dim=16)
    ),
    "simclr": replace(
        get_variant("simclr"),
        tiny_config=lambda: SimCLRConfig(backbone_config=bert(), projection_dim=16, heads_batch_norm=False),
    ),
    "byol": replace(
        get_variant("byol"),
        tiny_config=lambda: BYOLConfig(
            backbone_config=bert(), projection_dim=16, projection_hidden_dim=32, predictor_hidden_dim=32
        ),
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.mark.parametrize(
    "check",
    [
        models.test_config_survives_a_round_trip,
        models.test_weights_buffers_and_freezing_survive_a_round_trip,
        models.test_auto_classes_resolve,
        models.test_encoder_starts_from_a_stock_checkpoint,
        training.test_plain_trainer_works,
        training.test_log_names_the_parts_of_the_loss_and_the_speed,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_conformance(check, variant, tmp_path):
    check(variant, tmp_path)


@pytest.mark.parametrize(
    "check",
    [
        models.test_loss_comes_first_and_can_be_left_out,
        models.test_every_trainable_parameter_gets_a_gradient,
        models.test_evaluation_gives_the_same_twice,
        models.test_hidden_states_and_attentions_are_the_encoders,
        models.test_bfloat16_weights,
        models.test_processor_makes_what_the_model_takes,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_conformance_of_forward(check, variant):
    check(variant)


def test_training_goes_on_where_it_was_interrupted(tmp_path):
    training.test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(VARIANTS["byol"], tmp_path)


def test_one_graph():
    # Without dropout, whose draws a compiled graph makes elsewhere.
    plain = replace(
        VARIANTS["simclr"],
        tiny_config=lambda: SimCLRConfig(backbone_config=bert(**PLAIN), projection_dim=16, heads_batch_norm=False),
    )
    models.test_compiles_to_one_graph_without_recompiling(plain)


def test_exported_encoder_is_a_plain_bert_with_its_tokenizer(variant, tmp_path):
    model = tiny_model(variant).eval()
    processor = TextProcessor(**model.config.processor_settings())
    export_encoder(model, processor, tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(encoder) is BertModel
    tokens = tokenizer(["one text", "and another"], padding=True, return_tensors="pt")
    expected = model.backbone(**processor(["one text", "and another"])).last_hidden_state
    torch.testing.assert_close(encoder.eval()(**tokens).last_hidden_state, expected)


def test_backbone_decides_what_is_taken():
    texts, pictures = SimCLRConfig(backbone_config=tiny_bert()), SimCLRConfig()
    assert (texts.modality, pictures.modality, SimCLRConfig.modality) == ("text", "image", "image")
    assert texts.processor == TextProcessor.__name__ and pictures.processor == MultiViewImageProcessor.__name__
    assert texts.processor_settings() == {"max_length": 32, "vocab_size": 261, "pad_token_id": 0, "num_views": 2}
    model = SimCLRForPreTraining(texts)
    assert model.main_input_name == "input_ids"
    with pytest.raises(ValueError, match="takes texts: `input_ids` alone"):
        model(pixel_values=torch.zeros(2, 2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(batch, 2, tokens\)"):
        model(**example_texts(texts.backbone_config, 2))
    with pytest.raises(ValueError, match="text_pooling is 'max'"):
        SimCLRConfig(text_pooling="max")


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_whole(name):
    assert set(BACKBONES) | {"xlm-roberta"} == set(TEXT_BACKBONES)
    config = SimCLRConfig(backbone_config=copy.deepcopy(BACKBONES[name]), projection_dim=16, temperature=0.05)
    processor = TextProcessor(**config.processor_settings() | {"pad_token_id": None})
    model = SimCLRForPreTraining(config).train()
    batch = processor(["a text", "another one", "and the third"], training=True, seed=0)
    assert batch["input_ids"].shape == (3, 2, processor.max_length)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters() if p.requires_grad)


def test_padding_changes_nothing():
    for pooling in ("mean", "cls"):
        torch.manual_seed(0)
        config = SimCLRConfig(backbone_config=tiny_bert(), heads_batch_norm=False, text_pooling=pooling)
        model = SimCLRForPreTraining(config).eval()
        short, long = (
            TextProcessor(max_length=length, num_views=2)(["one", "three four"], training=True, seed=0)
            for length in (14, 32)
        )
        torch.testing.assert_close(model(**short).loss, model(**long).loss)


def test_dropout_alone_makes_two_views():
    torch.manual_seed(0)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny_bert(), heads_batch_norm=False))
    batch = TextProcessor(max_length=32, num_views=2)(["one text", "and another"], training=True)
    output = model.eval()(**batch)
    assert torch.equal(output.z1, output.z2)
    output = model.train()(**batch)
    assert not torch.allclose(output.z1, output.z2)


def test_byols_twin_is_given_the_texts_too():
    torch.manual_seed(0)
    model = BYOLForPreTraining(VARIANTS["byol"].tiny_config()).eval()
    batch = example_texts(model.config.backbone_config, 3, 2)
    expected = model(**batch).target_projections
    batch["input_ids"][:, 1] = batch["input_ids"][:, 0]
    changed = model(**batch).target_projections
    assert torch.equal(changed[:, 0], expected[:, 0]) and not torch.equal(changed[:, 1], expected[:, 1])


def test_triplets_of_texts_are_learnt():
    torch.manual_seed(0)
    config = TripletConfig(backbone_config=bert(**PLAIN), loss_type="soft_margin")
    model = TripletForPreTraining(config).train()
    processor = TextProcessor(**config.processor_settings())
    samples = [["red green", "green red red", "one two"], ["two one", "one one two", "red red"]] * 4
    batch = processor(samples, training=True, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(**batch).loss.item()
    for _ in range(10):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    output = model(**batch)
    assert output.loss.item() < 0.5 * first and output.triplet_accuracy == 1
    assert output.embeddings.shape == (8, 3, 32)
