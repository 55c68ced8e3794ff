"""dBOT's symmetric form, a BEiT with mask tokens, against its reference's branch `beit`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from hf_masked import DBOTConfig, DBOTForImageClassification, DBOTForPreTraining
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_latent.dbot import SYMMETRIC, convert_official_weights, new_student
from hf_masked.modeling.parts.beit import beit_vit
from hf_masked.modeling.parts.blocks import DropPath
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.registry import get_variant
from hf_masked.processing.masks import MASKS
from tests.conformance import test_mask_kinds, test_models, test_training
from tests.conformance.cases import processor_of
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "dbot.json").read_text())["symmetric"]["runs"]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Its patches are half as large as the student's, and its pictures too.
CLIP = CLIPVisionConfig(**SIZES | {"hidden_size": 24}, image_size=16, patch_size=4, projection_dim=20)


def tiny_config(**settings) -> DBOTConfig:
    backbone_config = beit_vit(**SIZES, image_size=32, patch_size=8)
    defaults = SYMMETRIC | {"drop_path_rate": 0.0, "backbone_config": backbone_config, "teacher_config": CLIP}
    return DBOTConfig(**defaults | settings)


def tiny(**settings) -> DBOTForPreTraining:
    torch.manual_seed(0)
    return DBOTForPreTraining(tiny_config(**settings))


OWN_TEACHER = {"teacher_config": None, "teacher_projection": False}
VARIANT = dataclasses.replace(get_variant("dbot"), tiny_config=tiny_config)


# OpenAI's names of CLIP -> those of transformers.
CLIP_RENAMING = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^proj$", "visual_projection.weight"),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.in_proj_", ".self_attn.{qkv}_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def save_clip(run: str, folder: Path) -> None:
    """The reference's teacher, filled by its names, as a checkpoint of transformers."""
    stored, config = PARITY[run], PARITY[run]["teacher_config"]
    named = filled({f"teacher.{name}": shape for name, shape in stored["teacher_parameters"].items()})
    weights = rename_weights({name.removeprefix("teacher."): value for name, value in named.items()}, CLIP_RENAMING)
    weights["visual_projection.weight"] = weights["visual_projection.weight"].T.contiguous()
    form = CLIPVisionConfig(
        hidden_size=config["width"],
        num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"],
        intermediate_size=4 * config["width"],
        image_size=config["input_resolution"],
        patch_size=config["patch_size"],
        projection_dim=config["output_dim"],
    )
    model = CLIPVisionModelWithProjection(form)
    # Some versions of transformers wrap the tower.
    model.load_state_dict({name: weights[name.removeprefix("vision_model.")] for name in model.state_dict()})
    model.save_pretrained(folder)


def filled_model(run: str, folder: Path) -> DBOTForPreTraining:
    """Filled by the reference's names and converted, strictly; with the reference's CLIP as teacher."""
    stored, config = PARITY[run], PARITY[run]["config"]
    save_clip(run, folder)
    backbone_config = beit_vit(
        hidden_size=config["embed_dim"],
        num_hidden_layers=config["depth"],
        num_attention_heads=config["num_heads"],
        intermediate_size=config["embed_dim"] * config["mlp_ratio"],
        image_size=config["img_size"],
        patch_size=config["patch_size"],
    )
    settings = SYMMETRIC | {"teacher": str(folder), "loss_on_class_token": stored["recon_cls_token"]}
    model = DBOTForPreTraining(DBOTConfig(backbone_config=backbone_config, **settings)).eval()
    model.load_state_dict(convert_official_weights(filled(stored["parameters"]), model.config))
    return model


def inputs_of(run: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and the mask."""
    stored, side = PARITY[run], PARITY[run]["config"]["img_size"]
    units = (side // stored["config"]["patch_size"]) ** 2
    noise = filled_noise(stored["batch"], units, f"symmetric.{run}.noise")
    mask = noise > noise.sort(dim=1).values[:, int(0.6 * units) - 1 : int(0.6 * units)]
    assert mask.int().tolist() == stored["mask"]
    return filled_pixels((stored["batch"], 3, side, side), f"symmetric.{run}.pixels"), mask


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.as_tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY)
def test_loss_predictions_targets_and_gradients_are_the_references(run, tmp_path):
    stored, model = PARITY[run], filled_model(run, tmp_path)
    pixel_values, mask = inputs_of(run)
    output = model(pixel_values, mask)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    close(output.logits, stored["pred"])
    teacher = torch.tensor(stored["teacher"])
    if not stored["recon_cls_token"]:
        assert not output.target[:, 0].any()
        teacher[:, 0] = 0.0
    close(output.target, teacher)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    seen = set()
    for name, norm in stored["gradient_norms"].items():
        ours = set(convert_official_weights({name: torch.zeros(3)}, model.config)) - {"stage"}
        seen |= ours
        assert torch.stack([gradients[n].norm() for n in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    assert seen == gradients.keys()


def official_shapes(width: int = 512, scale: int = 16) -> dict[str, tuple[int, ...]]:
    """Of the reference's ViT-B/16 with `width` outputs, a `scale`-th as wide."""
    hidden = 768 // scale
    shapes = {
        "cls_token": (1, 1, hidden),
        "mask_token": (1, 1, hidden),
        "patch_embed.proj.weight": (hidden, 3, 16, 16),
        "patch_embed.proj.bias": (hidden,),
        "rel_pos_bias.relative_position_bias_table": (27 * 27 + 3, 12),
        "rel_pos_bias.relative_position_index": (197, 197),
        "norm.weight": (hidden,),
        "norm.bias": (hidden,),
        "lm_head.weight": (width, hidden),
        "lm_head.bias": (width,),
    }
    block = {name: shape for name, shape in PARITY["patches"]["parameters"].items() if name.startswith("blocks.0.")}
    of_parity = PARITY["patches"]["config"]["embed_dim"]
    for number in range(12):
        for name, shape in block.items():
            shapes[name.replace("blocks.0", f"blocks.{number}")] = tuple(s * hidden // of_parity for s in shape)
    return shapes


@pytest.mark.parametrize(("width", "teacher"), [(512, "base-patch16"), (768, "large-patch14")])
def test_official_checkpoints_convert(width, teacher, tmp_path):
    official = filled(official_shapes(width))
    torch.save({"model": official}, tmp_path / "clip.pth")
    model = convert(get_variant("dbot"), tmp_path / "clip.pth")
    assert type(model) is DBOTForPreTraining and model.config.teacher == f"openai/clip-vit-{teacher}"
    assert model.config.teacher_size == width and model.config.backbone_config.image_size == 224
    assert torch.equal(model.decoder.weight, official["lm_head.weight"])
    block = model.backbone.layers[11]
    assert torch.equal(block.attention.v_proj.bias, official["blocks.11.attn.v_bias"])
    assert torch.equal(block.lambda_2, official["blocks.11.gamma_2"])
    torch.save(official | {"surplus": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="surplus"):
        convert(get_variant("dbot"), tmp_path / "more.pth")


def test_other_official_checkpoints_are_refused(tmp_path):
    for changes, words in (({"lm_head.weight": torch.zeros(100, 48)}, "100 wide"), ({}, "Fine-tuned")):
        official = filled(official_shapes()) | changes
        if not changes:
            del official["rel_pos_bias.relative_position_bias_table"]
        torch.save(official, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=words):
            convert(get_variant("dbot"), tmp_path / "other.pth")


def test_base_model_is_the_references():
    """Its ViT-B/16 with CLIP's 512 outputs has 86,059,856 parameters."""
    teacher = CLIPVisionConfig(patch_size=16)
    with torch.device("meta"):
        model = DBOTForPreTraining(DBOTConfig(**SYMMETRIC, teacher_config=teacher))
    assert sum(p.numel() for p in model.parameters()) == 86_059_856
    assert model.backbone.config.layer_scale_init_value == 0.1 and model.backbone.config.layer_norm_eps == 1e-6
    rates = [module.rate for module in model.backbone.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    assert model.no_weight_decay() == {"cls_token", "position_embeddings"}


def test_initialisation_is_beits():
    model = DBOTForPreTraining(tiny_config(backbone_config=beit_vit(**SIZES | {"hidden_size": 96}), **OWN_TEACHER))
    narrowed = 0.02 * 0.5396  # the deviation of a normal that is cut off at one deviation
    for weight, expected in (
        (model.decoder.weight, narrowed),
        (model.backbone.embeddings.patch_embeddings.projection.weight, narrowed),
        (model.backbone.layers[1].attention.q_proj.weight, narrowed),
        (model.backbone.layers[1].mlp.fc2.weight, narrowed / 2),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not model.backbone.shared_position_bias.relative_position_bias_table.any()
    assert not model.decoder.bias.any() and model.backbone.embeddings.mask_token.any()


def test_loss_is_one_minus_the_cosine_on_masked_patches():
    mask = torch.arange(16).expand(2, -1) % 3 == 0
    for on_class_token in (False, True):
        model, pixel_values = tiny(loss_on_class_token=on_class_token), torch.randn(2, 3, 32, 32)
        output = model(pixel_values, mask)
        expected = []
        for picture in range(2):
            for row in range(17):
                if mask[picture, row - 1] if row else on_class_token:
                    p, t = output.logits[picture, row], output.target[picture, row]
                    expected.append(1 - p @ t / (p @ p * (t @ t)).sqrt())
        assert len(expected) == 2 * (6 + on_class_token)
        torch.testing.assert_close(output.loss, torch.stack(expected).mean())
        assert output.target[:, 0].any() == on_class_token


def test_target_is_clips_projection_of_a_resized_picture():
    model, pixel_values = tiny(loss_on_class_token=True), torch.randn(2, 3, 32, 32)
    teacher = model.teacher.prepare(torch.device("cpu"))
    pictures = F.interpolate(pixel_values, (16, 16), mode="bicubic", antialias=True)
    tokens = model.teacher._norm(teacher(pictures).last_hidden_state)
    expected = tokens @ teacher.visual_projection.weight.T
    torch.testing.assert_close(model.target(pixel_values, (4, 4)), expected)


def test_class_token_is_the_target_of_every_token_before_the_patches():
    """The asymmetric form with a DeiT, which has two."""
    backbone_config = DeiTConfig(**SIZES, image_size=32, patch_size=8)
    settings = {"backbone_config": backbone_config, "architecture": "asymmetric", "loss_on_class_token": True}
    model, pixel_values = tiny(**settings), torch.randn(2, 3, 32, 32)
    with_class_token = model.teacher.features(pixel_values, (4, 4), class_token=True)
    assert torch.equal(model.target(pixel_values, (4, 4)), with_class_token[:, [0, *range(17)]])
    torch.testing.assert_close(with_class_token[:, 1:], model.teacher.features(pixel_values, (4, 4)))
    model(pixel_values).loss.backward()


def test_processor_normalises_as_the_config_says():
    processor = processor_of(VARIANT, tiny_config(image_mean=0.25, image_std=[0.2, 0.3, 0.4]))
    assert processor.image_mean == [0.25] * 3 and processor.image_std == [0.2, 0.3, 0.4]


def test_masks_are_78_of_196_in_blocks():
    config = DBOTConfig(**SYMMETRIC, teacher_config=CLIPVisionConfig(patch_size=16))
    processor = processor_of(get_variant("dbot"), config)
    pictures = torch.zeros(64, 3, 224, 224, dtype=torch.uint8).numpy()
    mask = processor(list(pictures), seed=0)["bool_masked_pos"]
    assert mask.flatten(1).sum(dim=1).tolist() == [78] * 64
    mask = mask.view(-1, 14, 14)
    neighbours = (mask[:, 1:] & mask[:, :-1]).float().mean().item()
    # Two neighbours of independent patches are both masked in 0.158 of the cases.
    assert neighbours > 0.25


def test_encoder_is_stock_beit_and_sees_mask_tokens_in_place_of_masked_patches():
    model, pixel_values = tiny().eval(), torch.randn(2, 3, 32, 32)
    mask = torch.arange(16).expand(2, -1) % 3 == 0
    output = model(pixel_values, mask)
    torch.testing.assert_close(
        output.last_hidden_state, model.backbone(pixel_values, bool_masked_pos=mask).last_hidden_state
    )
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = model(pixel_values.masked_fill(hidden, 9.0), mask)
    assert torch.equal(other.logits, output.logits), "what is masked cannot be seen"
    assert not torch.equal(other.target, output.target), "but by the teacher"
    assert not torch.equal(model(pixel_values.masked_fill(~hidden, 9.0), mask).logits, output.logits)


def test_export_is_a_plain_beit_without_mask_token(tmp_path):
    model = tiny(drop_path_rate=0.5).eval()
    model.plain_backbone().save_pretrained(tmp_path)
    plain, report = BeitModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and plain.embeddings.mask_token is None
    pixel_values = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(pixel_values)[0], model.backbone(pixel_values)[0])
    started = DBOTForPreTraining.from_backbone(plain, **SYMMETRIC | {"teacher_config": CLIP})
    assert started.config.is_symmetric and torch.equal(started.backbone.layers[0].lambda_1, plain.layers[0].lambda_1)


# Stages, which the reference's branch has settings for: the student's copy teaches the next student.


def test_a_stage_makes_the_beit_the_teacher_and_starts_a_new_one():
    model, pixel_values = tiny(**OWN_TEACHER, num_stages=2), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.backbone.embeddings.cls_token.add_(1.0)
    trained = {name: p.clone() for name, p in model.backbone.named_parameters()}
    model.start_stage()
    for name, parameter in model.teacher.backbone.named_parameters():
        assert torch.equal(parameter, trained[name]) and not parameter.requires_grad, name
    fresh = new_student(model.config, 1)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    expected = model.teacher.backbone.layernorm(
        model.teacher.backbone(pixel_values, output_hidden_states=True).hidden_states[-1]
    )
    torch.testing.assert_close(model.target(pixel_values, (4, 4)), expected)


def test_patch_embedding_as_a_teacher_is_linear_in_the_patch():
    model = tiny(**OWN_TEACHER, num_stages=2, initial_teacher="patch_embedding", teacher_final_norm=False)
    pixel_values = torch.randn(2, 3, 32, 32)
    projected = model.backbone.embeddings.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.target(pixel_values, (4, 4))[:, 1:], projected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architecture": "both"}, ["both", "asymmetric"]),
        ({"backbone_config": ViTConfig()}, ["symmetric", "vit", "BEiT"]),
        ({"architecture": "asymmetric"}, ["asymmetric", "beit"]),
        ({"teacher_config": ViTConfig()}, ["vit", "teacher_projection"]),
        ({"teacher_config": None}, ["teacher_projection", "teacher"]),
        ({"num_stages": 2}, ["num_stages=1"]),
        ({"backbone_config": beit_vit(use_mean_pooling=True)}, ["use_mean_pooling"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_what_the_form_or_its_teacher_lack_is_said():
    with pytest.raises(ValueError, match="plain_backbone"):
        DBOTForImageClassification(tiny_config())
    siglip = SiglipVisionConfig(**SIZES, image_size=16, patch_size=4)
    model = tiny(teacher_config=siglip, teacher_projection=False, loss_on_class_token=True)
    with pytest.raises(ValueError, match="no class token"):
        model(torch.randn(2, 3, 32, 32))


# The conformance suite tries the asymmetric form; here it tries this one.

CHECKS = {
    test_models.test_config_survives_a_round_trip: [{}],
    test_models.test_weights_buffers_and_freezing_survive_a_round_trip: [{}],
    test_models.test_one_checkpoint_serves_both_classes: [{}],
    test_models.test_loss_comes_first_and_can_be_left_out: [{}],
    test_models.test_every_trainable_parameter_gets_a_gradient: [{}],
    test_models.test_training_draws_from_torchs_generator: [{}],
    test_models.test_hidden_states_and_attentions_are_the_encoders: [{}],
    test_models.test_attention_kernels_agree: [{}],
    test_models.test_half_precision_autocast: [{"dtype": torch.bfloat16}],
    test_models.test_bfloat16_weights: [{}],
    test_models.test_gradient_checkpointing_changes_nothing: [{}],
    test_models.test_compiles_to_one_graph_without_recompiling: [{}],
    test_models.test_compiles_to_one_graph_where_the_model_draws: [{}],
    test_models.test_rectangles_channels_and_single_samples: [{"channels": 1}, {"channels": 4}],
    test_models.test_wrong_inputs_are_named: [{}],
    test_mask_kinds.test_method_learns_from_masks_of_the_processor: [
        {"kind": kind, "config": tiny_config(mask_ratio=0.75)} for kind in MASKS
    ],
    test_training.test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit: [{}],
}


@pytest.mark.parametrize(
    ("check", "arguments"),
    [(check, arguments) for check, cases in CHECKS.items() for arguments in cases],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_is_a_transformers_citizen(check, arguments, tmp_path):
    needs_folder = "tmp_path" in check.__code__.co_varnames[: check.__code__.co_argcount]
    check(VARIANT, **arguments | ({"tmp_path": tmp_path} if needs_folder else {}))
