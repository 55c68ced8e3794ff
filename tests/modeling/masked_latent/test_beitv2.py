"""BEiT v2 against its reference, and every check of its spec (section 11) that concerns the student."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, BeitModel

from hf_masked import (
    BEiTv2Config,
    BEiTv2ForPreTraining,
    BEiTv2Model,
    MaskedImageProcessor,
    VQKDConfig,
    VQKDForPreTraining,
    VQKDModel,
)
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_latent import vqkd
from hf_masked.modeling.masked_latent.beitv2 import (
    convert_official_weights,
    official_config,
    tiny_config,
)
from hf_masked.modeling.parts.beit import beit_vit
from hf_masked.modeling.registry import get_variant
from hf_masked.processing.masks import block as blocks
from hf_masked.randomness import keyed_draw, sample_keys
from hf_masked.training.export import export_encoder
from hf_masked.training.optimization import parameter_groups
from tests.conformance.test_training import trainer_of
from tests.modeling.masked_image.short_runs import fashion, knn, pretrain
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "beitv2.json").read_text())


LARGE = {"num_hidden_layers": 24, "use_shared_relative_position_bias": True, "use_mean_pooling": False}


def small_model(seed: int = 0, layers: int = 4, vocab_size: int = 16, **settings) -> BEiTv2ForPreTraining:
    """Without a tokenizer; 4 x 4 patches."""
    backbone_config = beit_vit(
        drop_path_rate=0.0,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(seed)
    arguments = {"backbone_config": backbone_config, "early_layers": 2, "vocab_size": vocab_size}
    return BEiTv2ForPreTraining(BEiTv2Config(**arguments | settings))


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "token_ids": torch.randint(16, (2, 16), generator=generator),
    }


# The reference, through the stored values


def official_weights(run: str) -> dict[str, torch.Tensor]:
    """A checkpoint of the reference as `torch.load` gives it."""
    stored = PARITY["pretraining"][run]
    buffers = {name: torch.zeros(shape) for name, shape in stored["buffers"].items()}
    return filled(stored["parameters"]) | buffers


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    reference, official = stored["config"], official_weights(run)
    config = official_config(official)
    config.early_layers = reference["early_layers"]
    model = BEiTv2ForPreTraining(config).train()
    model.load_state_dict(convert_official_weights(official, config))
    batch, size = reference["batch"], reference["img_size"]
    units = (size // reference["patch_size"]) ** 2
    mask = filled_noise(batch, units, f"{run}.noise") < 0.4
    assert mask.int().tolist() == stored["mask"]
    token_ids = (filled_noise(batch, units, f"{run}.tokens") * reference["vocab_size"]).long()
    pixel_values = filled_pixels((batch, 3, size, size), f"{run}.pixels")
    return stored, model, model(pixel_values, bool_masked_pos=mask, token_ids=token_ids)


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_losses_and_logits_are_the_references(run):
    stored, _, output = run_as_reference(run)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    assert [part.item() for part in output.losses.values()] == pytest.approx(stored["losses"], rel=1e-5)
    close(output.logits, stored["logits"])
    close(output.logits_aggregation, stored["logits_aggregation"])
    close(output.last_hidden_state[:, 1:], stored["patch_tokens"])


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, output = run_as_reference(run)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        probe = {name: torch.zeros(stored["parameters"][name])}
        ours = [gradients.pop(converted) for converted in convert_official_weights(probe, model.config)]
        assert torch.stack([g.norm() for g in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    assert not gradients, "every parameter of ours is one of the reference's"


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_official_file_converts_strictly(run, tmp_path):
    reference, official = PARITY["pretraining"][run]["config"], official_weights(run)
    torch.save({"model": official, "epoch": 1599}, tmp_path / "beitv2.pth")
    config = convert(get_variant("beitv2"), tmp_path / "beitv2.pth").config
    backbone = config.backbone_config
    assert (backbone.num_hidden_layers, backbone.num_attention_heads) == (reference["depth"], reference["num_heads"])
    assert (backbone.image_size, backbone.patch_size) == (reference["img_size"], reference["patch_size"])
    assert (config.vocab_size, config.aggregation_layers) == (reference["vocab_size"], reference["head_layers"])
    assert config.shared_head == reference["shared_lm_head"]
    torch.save({"model": official | {"fc_norm.weight": torch.zeros(1)}}, tmp_path / "beitv2.pth")
    with pytest.raises(ValueError, match=r"left over: fc_norm\.weight"):
        convert(get_variant("beitv2"), tmp_path / "beitv2.pth")


def test_early_layer_of_released_models_and_other_checkpoints():
    """9 of 12 and 21 of 24; a fine-tuned one has a table in each block."""
    official = official_weights("shared_head")
    for depth in (12, 24):
        deep = official | {f"blocks.{depth - 1}.norm1.weight": torch.zeros(32)}
        assert official_config(deep).early_layers == depth - 3
    with pytest.raises(ValueError, match="Fine-tuned"):
        official_config({"blocks.0.attn.relative_position_bias_table": torch.zeros(3, 1)})


# The spec's section 11


def test_masks_of_75_patches_for_every_seed():
    """Check 1: of the paper's grid, from the processor and from the model."""
    config = BEiTv2Config()
    assert (config.vocab_size, config.early_layers, config.aggregation_layers) == (8192, 9, 2)
    assert BEiTv2Config(backbone_config={"model_type": "beit", **LARGE}).early_layers == 21
    processor = MaskedImageProcessor(**config.processor_settings())
    picture = torch.zeros(3, 224, 224, dtype=torch.uint8)
    given = torch.cat([processor([picture] * 2, seed=seed)["bool_masked_pos"] for seed in range(10)])
    small = small_model()
    small.config.mask_ratio, small.training = config.mask_ratio, True
    drawn = small.draw_mask(torch.zeros(100, 3, 224, 224), (14, 14))
    assert given.sum(dim=1).unique().tolist() == drawn.sum(dim=1).unique().tolist() == [75]


def test_no_block_spans_a_whole_side(monkeypatch):
    """Check 1: of one proposal of 60 to 75 patches, the flattest, whose side would be 14, are left out, not cut."""
    monkeypatch.setattr(blocks, "PROPOSALS", 1)
    draw = keyed_draw(sample_keys(0, 0, range(500)))
    grid = blocks.block_mask(draw, (14, 14), 75 / 196, min_units=60, min_aspect=0.3).view(500, 14, 14)
    # Single patches that fill up may complete one row or column, not four that lie side by side.
    for masks in (grid, grid.transpose(1, 2)):
        assert not masks.all(dim=1).unfold(1, 4, 1).all(dim=2).any()
    placed = grid.unfold(1, 5, 1).unfold(2, 5, 1).flatten(3).all(dim=3).flatten(1).any(dim=1)
    assert 0.4 < placed.float().mean() < 0.9


def test_without_extra_blocks_both_heads_agree():
    """Check 5: BEiT's limit."""
    model = small_model(aggregation_layers=0, early_layers=4)
    output = model(**inputs())
    assert torch.equal(output.logits, output.logits_aggregation)
    torch.testing.assert_close(output.loss, 2 * output.losses["tokens"])


def test_uniform_logits_cost_twice_the_logarithm_of_the_vocabulary():
    """Check 6."""
    model = small_model(vocab_size=8192)
    torch.nn.init.zeros_(model.head.weight)
    assert model(**inputs()).loss.item() == pytest.approx(2 * math.log(8192), rel=1e-6)


def test_aggregation_reaches_late_blocks_through_the_class_token_only():
    """Check 7: the aggregation loss, with the class token's path cut, leaves the blocks after the early one alone."""
    model = small_model()
    batch = inputs()
    mask = torch.arange(16).expand(2, -1) % 2 == 0

    def without_class_gradient(module, arguments, tokens):
        return torch.cat([tokens[:, :1].detach(), tokens[:, 1:]], dim=1)

    def gradients(cut: bool) -> list[bool]:
        model.zero_grad()
        late = model.backbone.layers[-1].register_forward_hook(without_class_gradient) if cut else None
        output = model(batch["pixel_values"], bool_masked_pos=mask, token_ids=batch["token_ids"])
        if cut:
            late.remove()
        F.cross_entropy(output.logits_aggregation, batch["token_ids"][mask]).backward()
        weights = [layer.mlp.fc1.weight.grad for layer in model.backbone.layers]
        return [gradient is not None and bool(gradient.abs().max() > 0) for gradient in weights]

    assert gradients(cut=False) == [True] * 4
    assert gradients(cut=True) == [True, True, False, False]


def test_aggregation_sees_the_class_token_before_the_norm():
    model = small_model(aggregation_layers=1)
    seen = {}
    model.aggregation_layers[0].register_forward_pre_hook(lambda module, arguments: seen.update(tokens=arguments[0]))
    output = model.eval()(**inputs(), output_hidden_states=True)
    assert torch.equal(seen["tokens"][:, 0], output.hidden_states[-1][:, 0])
    assert not torch.allclose(seen["tokens"][:, 0], output.last_hidden_state[:, 0])
    assert torch.equal(seen["tokens"][:, 1:], output.hidden_states[2][:, 1:])


def test_loss_is_the_papers_equation_written_as_loops():
    model = small_model()
    batch = inputs()
    output = model(**batch)
    expected, masked = 0.0, output.mask.nonzero().tolist()
    for row, (sample, unit) in enumerate(masked):
        for logits in (output.logits[row], output.logits_aggregation[row]):
            expected -= logits.log_softmax(dim=0)[batch["token_ids"][sample, unit]] / len(masked)
    torch.testing.assert_close(output.loss, expected)
    assert output.accuracy == (output.logits.argmax(1) == batch["token_ids"][output.mask]).float().mean()


def test_rows_may_mask_different_counts():
    model, batch = small_model(), inputs()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :3], mask[1, 5:12] = True, True
    assert model(**batch, bool_masked_pos=mask).logits.shape == (10, 16)


def test_masked_pixels_are_not_seen_but_tokenised():
    model = BEiTv2ForPreTraining(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    hidden = output.mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(hidden, torch.randn_like(pixel_values), pixel_values)
    other = model(changed, bool_masked_pos=output.mask)
    assert torch.equal(other.logits, output.logits) and not torch.equal(other.token_ids, output.token_ids)


def test_encoder_is_the_plain_backbone():
    model = small_model().eval()
    pixel_values, mask = inputs()["pixel_values"], torch.arange(16).expand(2, -1) % 3 == 0
    encoder = BEiTv2Model(model.config).eval()
    encoder.backbone.load_state_dict(model.backbone.state_dict())
    for kwargs in ({}, {"bool_masked_pos": mask}):
        expected = model.backbone(pixel_values, **kwargs).last_hidden_state
        torch.testing.assert_close(encoder(pixel_values, **kwargs).last_hidden_state, expected)
    larger = torch.randn(1, 3, 48, 48)
    expected = model.backbone(larger, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(encoder(larger).last_hidden_state, expected)


# The tokenizer


def test_tokenizer_sees_the_same_picture_in_its_own_range():
    """The student's normalisation is undone: what the tokenizer is given is [0, 1] mapped to [-1, 1]."""
    config = BEiTv2Config(**tiny_config().to_dict() | {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.3, 0.4]})
    model = BEiTv2ForPreTraining(config).eval()
    pictures = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    tokenizer = model.tokenizer.encoder(model.device)
    expected = tokenizer(2 * pictures - 1).token_ids
    assert torch.equal(model.tokens((pictures - mean) / std, (4, 4)), expected)
    assert len(expected.unique()) > 2


def test_program_tells_the_config_how_its_processor_normalises():
    from hf_masked.training.cli import make_processor
    from hf_masked.training.recipes import MethodArguments

    model = BEiTv2ForPreTraining(tiny_config())
    arguments = MethodArguments("beitv2", processor={"image_mean": 0.3, "image_std": 0.2})
    make_processor(get_variant("beitv2"), model, arguments)
    assert model.config.image_mean == [0.3] * 3 and model.config.image_std == [0.2] * 3


def test_tokenizer_of_a_folder_is_frozen_and_stays_out_of_optimizer_and_checkpoint(tmp_path):
    """Check 4, for the student; check 2: that it labels leaves it as it is."""
    torch.manual_seed(3)
    VQKDForPreTraining(vqkd.tiny_config()).save_pretrained(tmp_path / "tokenizer")
    expected = VQKDModel.from_pretrained(tmp_path / "tokenizer").eval()
    settings = tiny_config().to_dict() | {"tokenizer": str(tmp_path / "tokenizer"), "tokenizer_config": None}
    model = BEiTv2ForPreTraining(BEiTv2Config(**settings))
    assert model.config.vocab_size == 16
    pixel_values = torch.randn(4, 3, 32, 32)
    before = model.train()(pixel_values)
    before.loss.backward()
    tokenizer = model.tokenizer.encoder(model.device)
    assert not tokenizer.training and all(p.grad is None and not p.requires_grad for p in tokenizer.parameters())
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    assert not any("tokenizer" in name for name in model.state_dict())
    ours = {id(p) for group in parameter_groups(model, weight_decay=0.05) for p in group["params"]}
    assert not ours & {id(p) for p in tokenizer.parameters()}
    model.save_pretrained(tmp_path / "student")
    loaded = BEiTv2ForPreTraining.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(loaded(pixel_values).loss, model.eval()(pixel_values).loss)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "student"), BEiTv2Model)


def test_what_is_no_tokenizer_is_named(tmp_path):
    model = small_model()
    pixel_values = inputs()["pixel_values"]
    with pytest.raises(ValueError, match="no tokenizer"):
        model(pixel_values)
    assert model(pixel_values, return_loss=False).loss is None
    with pytest.raises(ValueError, match=r"int64 \(2, 9\); expected torch.int64 \(2, 16\)"):
        model(pixel_values, token_ids=torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"The tokenizer {tmp_path} is neither"):
        BEiTv2Config(tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="The tokenizer is a vit"):
        BEiTv2Config(tokenizer_config={"model_type": "vit"})
    with pytest.raises(ValueError, match="16 codes and vocab_size is 99"):
        BEiTv2Config(**tiny_config().to_dict() | {"vocab_size": 99})
    with pytest.raises(ValueError, match=r"early_layers is 5; .* 4 blocks"):
        small_model(early_layers=5)
    with pytest.raises(ValueError, match="use_mean_pooling=False"):
        BEiTv2Config(backbone_config=beit_vit(drop_path_rate=0.0, use_mean_pooling=True))


# Initialisation, weight decay, drop path, export


def test_initialisation_is_the_references():
    """Cut at one deviation, whose own deviation is 0.54 of it; block l is divided by sqrt(2 l), counted on."""
    torch.manual_seed(0)
    model = small_model()
    layers = [*model.backbone.layers, *model.aggregation_layers]
    numbers = [1, 2, 3, 4, 3, 4]  # the aggregation blocks follow the early one, the second
    for number, block in zip(numbers, layers, strict=True):
        for linear in (block.attention.o_proj, block.mlp.fc2):
            limit = 0.02 / math.sqrt(2 * number)
            assert 0.95 * limit < linear.weight.abs().max() <= limit
        assert block.mlp.fc1.weight.abs().max() <= 0.02 and block.mlp.fc1.bias.abs().max() == 0
        assert (block.lambda_1 == 0.1).all() and (block.lambda_2 == 0.1).all()
    assert model.head.weight.std().item() == pytest.approx(0.54 * 0.02, rel=0.05)
    for token in (model.backbone.embeddings.cls_token, model.backbone.embeddings.mask_token):
        assert 0 < token.abs().max() <= 0.02


def test_weight_decay_leaves_out_what_the_reference_leaves_out():
    model = small_model()
    groups = parameter_groups(model, weight_decay=0.05)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert all(name.endswith(("bias", "cls_token")) or "norm" in name or "lambda" in name for name in names)
    assert "backbone.embeddings.cls_token" in names and "backbone.embeddings.mask_token" not in names


def test_drop_path_goes_on_from_the_early_block():
    """12 blocks and 2 after the 9th: as in the reference, the rates of 12 steps, those of blocks 10 and 11."""
    model = BEiTv2ForPreTraining(
        BEiTv2Config(
            backbone_config=beit_vit(
                hidden_size=8,
                num_attention_heads=2,
                intermediate_size=8,
                image_size=32,
                drop_path_rate=0.11,
            ),
            vocab_size=4,
        )
    )
    rates = [layer.drop_path.drop_prob for layer in model.aggregation_layers]
    assert rates == pytest.approx([0.09, 0.10])


def test_export_is_a_plain_beit_without_aggregation(tmp_path):
    model = small_model().eval()
    export_encoder(model, MaskedImageProcessor(**model.config.processor_settings()), tmp_path)
    plain, report = BeitModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values())
    pixel_values = inputs()["pixel_values"]
    torch.testing.assert_close(plain(pixel_values).last_hidden_state, model.backbone(pixel_values).last_hidden_state)


def test_log_shows_the_accuracy(tmp_path):
    trainer = trainer_of(get_variant("beitv2"), tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    assert 0 <= trainer.state.log_history[0]["accuracy"] <= 1


@pytest.mark.slow
def test_tokens_are_predicted_and_features_follow(tmp_path):
    """The experiment: Fashion-MNIST at 32 px; tokens of a tokenizer that a random tiny teacher has taught."""
    splits = fashion(4000, 1000)
    (pictures, _), (unseen, _) = splits
    normalization = {"image_mean": 0.286, "image_std": 0.353}
    settings = vqkd.tiny_config().to_dict() | normalization | {"codebook_size": 64}
    settings["backbone_config"]["num_channels"] = settings["teacher_config"]["num_channels"] = 1
    torch.manual_seed(0)
    tokenizer = VQKDForPreTraining(VQKDConfig(**settings))
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3)
    for _ in range(300):
        tokenizer.train()(pictures[torch.randint(len(pictures), (64,))]).loss.backward()
        optimizer.step()
        tokenizer.update_twins()
        optimizer.zero_grad()
    tokenizer.save_pretrained(tmp_path)
    backbone_config = beit_vit(
        drop_path_rate=0.0,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_channels=1,
    )
    student = {"backbone_config": backbone_config, "early_layers": 2, "aggregation_layers": 1}
    model = BEiTv2ForPreTraining(BEiTv2Config(**student, **normalization, tokenizer=str(tmp_path))).eval()
    untrained = knn(model, splits)
    pretrain(model, pictures, steps=600)
    with torch.no_grad():
        output = model(unseen)
    most_frequent = output.token_ids[output.mask].bincount().max() / output.mask.sum()
    assert output.accuracy > most_frequent + 0.1
    # Two points in these few steps: a random teacher's tokens say little of the class.
    assert knn(model, splits) > untrained
