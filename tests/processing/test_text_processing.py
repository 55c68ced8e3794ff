"""The processor of texts, its masks and views."""

import pytest
import torch
from transformers import AutoTokenizer, BertConfig

from hf_masked import TextProcessor
from hf_masked.processing.masks.tokens import fewest_and_most_masked, token_mask
from hf_masked.processing.text_processing import BYTES_VOCAB_SIZE, byte_tokenizer
from hf_masked.processing.text_views import close_gaps, kept_by_crop, kept_by_deletion
from hf_masked.randomness import keyed_draw, sample_keys, torch_draw

TEXTS = ["a short text", "and another one, which is longer than that"]


def draw(rows: int):
    return torch_draw(rows, generator=torch.Generator().manual_seed(0))


def test_byte_tokenizer_knows_every_text_and_needs_no_hf_masked(tmp_path):
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == BYTES_VOCAB_SIZE == 261
    assert tokenizer.pad_token_id == BertConfig().pad_token_id == 0 and tokenizer.mask_token_id == 4
    text = "Grüße, 世界 🙂\n\ttabs"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) + 2 and 1 not in ids
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert "hf_masked" not in type(loaded).__module__
    assert loaded(text)["input_ids"] == ids and loaded.decode(ids, skip_special_tokens=True) == text


def test_token_mask_counts_are_floor_or_ceiling_and_right_on_average():
    lengths = torch.tensor([20, 17, 9, 1, 0])
    maskable = (torch.arange(24) < lengths[:, None]).repeat(400, 1)
    mask = token_mask(draw(len(maskable)), maskable, 0.15)
    assert not (mask & ~maskable).any()
    counts = mask.sum(dim=1).view(400, 5)
    for length, column in zip(lengths.tolist()[:3], counts.T, strict=False):
        fewest, most = fewest_and_most_masked(length, 0.15)
        assert set(column.tolist()) == ({fewest, most} if fewest != most else {fewest})
        assert column.float().mean().item() == pytest.approx(0.15 * length, abs=0.1)
    assert counts[:, 3:].sum() == 0  # one always stays
    assert (mask.view(400, 5, 24)[:, 0].float().mean(dim=0)[:20] - 0.15).abs().max() < 0.07


def test_masks_are_functions_of_seed_epoch_and_index():
    processor = TextProcessor(max_length=32, mask_probability=0.3)
    tokens = processor.prepare(TEXTS * 2)
    first = processor.finish_training(tokens, torch.arange(4), 0, 0)["bool_masked_pos"]
    swapped = {name: value.flip(0) for name, value in tokens.items()}
    again = processor.finish_training(swapped, torch.arange(4).flip(0), 0, 0)["bool_masked_pos"]
    assert torch.equal(again.flip(0), first)
    assert not torch.equal(processor.finish_training(tokens, torch.arange(4), 0, 1)["bool_masked_pos"], first)


def test_views_are_equal_unless_something_is_left_out():
    plain = TextProcessor(max_length=48, num_views=2)(TEXTS, training=True, seed=0)["input_ids"]
    assert plain.shape == (2, 2, 48) and torch.equal(plain[:, 0], plain[:, 1])
    processor = TextProcessor(max_length=48, num_views=2, deletion_probability=0.3)
    views = processor(TEXTS, training=True, seed=0)
    assert not torch.equal(views["input_ids"][:, 0], views["input_ids"][:, 1])
    for row, there in zip(views["input_ids"].flatten(0, 1), views["attention_mask"].flatten(0, 1), strict=True):
        kept = row[there == 1]
        assert kept[0] == 2 and kept[-1] == 3 and (row[there == 0] == 0).all()
        assert len(kept) < 44 and there.diff().amax() == 0  # padding stands behind


def test_deletion_keeps_the_order_and_one_token_at_least():
    movable = torch.ones(200, 30, dtype=torch.bool)
    movable[:, 25:] = False
    kept = kept_by_deletion(draw(200), movable, 0.2)
    assert not kept[:, 25:].any() and kept[:, :25].float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (kept_by_deletion(draw(200), movable, 0.9999).sum(dim=1) >= 1).all()
    ids = torch.arange(30).repeat(200, 1)
    closed, there = close_gaps(ids, kept, pad_token_id=0)
    assert torch.equal(closed[7][there[7] == 1], ids[7][kept[7]])


def test_crop_is_one_stretch_of_the_right_length():
    movable = torch.ones(200, 21, dtype=torch.bool)
    movable[:, 0] = False
    kept = kept_by_crop(draw(200), movable, (0.2, 0.5))
    lengths = kept.sum(dim=1)
    assert lengths.min() >= 4 and lengths.max() <= 10 and len(lengths.unique()) > 3
    assert (kept.long().diff(dim=1, prepend=torch.zeros(200, 1).long()).clamp(min=0).sum(dim=1) == 1).all()
    assert torch.equal(kept_by_crop(keyed_draw(sample_keys(0, 0, range(200))), movable, (1.0, 1.0)), movable)


def test_texts_of_a_set_give_one_view_each():
    processor = TextProcessor(max_length=16, num_views=3)
    batch = processor([["a", "b", "c"], ["d", "e", "f"]], training=True, seed=0)
    assert batch["input_ids"].shape == (2, 3, 16)
    assert processor.tokenizer.decode(batch["input_ids"][1, 2], skip_special_tokens=True) == "f"
    with pytest.raises(ValueError, match="2 texts and num_views is 3"):
        processor([["a", "b"]], training=True)


def test_inference_pads_to_the_longest_and_cuts():
    processor = TextProcessor(max_length=20, mask_probability=0.15)
    batch = processor(["abc", "abcde"])
    assert batch["input_ids"].shape == (2, 7) and "bool_masked_pos" not in batch
    assert processor("a" * 100)["input_ids"].shape == (1, 20)


def test_processor_and_tokenizer_come_back(tmp_path):
    processor = TextProcessor(max_length=24, num_views=2, deletion_probability=0.1, crop_scale=(0.5, 1.0))
    processor.save_pretrained(tmp_path)
    loaded = TextProcessor.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == processor.to_dict() and "tokenizer" not in loaded.to_dict()
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert torch.equal(loaded(TEXTS)["input_ids"], processor(TEXTS)["input_ids"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "vocab_size 261"),
        ({"mask_token_id": 103}, "mask_token_id is 4 and the model's 103"),
        ({"tokenizer": "/nowhere"}, "no tokenizer '/nowhere'"),
        ({"deletion_probability": 1.0}, "deletion_probability is 1.0"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is"),
        ({"mask_probability": 1.5}, "1.5"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TextProcessor(**settings)
