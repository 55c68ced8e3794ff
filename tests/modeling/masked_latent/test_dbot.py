"""dBOT against its reference, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SwinConfig,
    ViTConfig,
)

from hf_masked import DBOTConfig, DBOTForImageClassification, DBOTForPreTraining, MAEForPreTraining
from hf_masked.modeling.masked_image.mae import MAEConfig
from hf_masked.modeling.masked_latent.dbot import (
    convert_official_weights,
    new_student,
    official_config,
    principal_colours,
    tiny_config,
)
from hf_masked.modeling.parts.backbones import encode_visible
from hf_masked.modeling.parts.blocks import DropPath
from hf_masked.modeling.parts.patches import patchify
from hf_masked.modeling.parts.targets import normalize_patches
from hf_masked.modeling.registry import get_variant
from hf_masked.training.callbacks import TrainingProgressCallback
from tests.conformance.test_training import trainer_of, weights
from tests.modeling.masked_image.short_runs import fashion, knn, pretrain
from tests.parity.fill import filled, filled_noise, filled_pixels

ONE_STAGE = {"num_stages": 1, "loss_on_class_token": False}
PARITY = json.loads((Path(__file__).parents[2] / "parity" / "dbot.json").read_text())["pretraining"]


def config_of(run: str) -> DBOTConfig:
    """Our config for the arguments of the reference's constructor and of its `forward`."""
    stored = PARITY[run]
    reference = stored["config"]
    return DBOTConfig(
        backbone_config=ViTConfig(
            hidden_size=reference["embed_dim"],
            num_hidden_layers=reference["depth"],
            num_attention_heads=reference["num_heads"],
            intermediate_size=reference["embed_dim"] * reference["mlp_ratio"],
            layer_norm_eps=1e-6,
            image_size=reference["img_size"],
            patch_size=reference["patch_size"],
        ),
        mask_ratio=stored["mask_ratio"],
        initial_teacher="student_init" if stored["teacher_depth"] else "patch_embedding",
        normalize_target=reference["norm_feature_loss"],
        teacher_final_norm=bool(stored["tlayernorm"]),
        decoder_hidden_size=reference["decoder_embed_dim"],
        decoder_num_hidden_layers=reference["decoder_depth"],
        decoder_num_attention_heads=reference["decoder_num_heads"],
        decoder_intermediate_size=reference["decoder_embed_dim"] * reference["mlp_ratio"],
    )


def filled_model(run: str) -> DBOTForPreTraining:
    """Filled by the reference's names and converted; only the fixed tables, which are ours to make, may be missing."""
    stored, model = PARITY[run], DBOTForPreTraining(config_of(run)).eval()
    student = convert_official_weights(filled(stored["parameters"]), model.config)
    report = model.load_state_dict(student, strict=False)
    assert all("position_embeddings" in name for name in report.missing_keys) and not report.unexpected_keys
    if stored["teacher_parameters"] is None:
        model.teacher.reset(model)
        return model
    named = filled({f"teacher.{name}": shape for name, shape in stored["teacher_parameters"].items()})
    teacher = convert_official_weights({n.removeprefix("teacher."): w for n, w in named.items()}, model.config)
    report = model.teacher.load_state_dict(teacher, strict=False)
    assert all("position_embeddings" in name for name in report.missing_keys) and not report.unexpected_keys
    return model


def inputs_of(run: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and noise."""
    stored, side = PARITY[run], PARITY[run]["config"]["img_size"]
    units = (side // stored["config"]["patch_size"]) ** 2
    noise = filled_noise(stored["batch"], units, f"{run}.noise")
    return filled_pixels((stored["batch"], 3, side, side), f"{run}.pixels"), noise


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.as_tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


def tiny(**settings) -> DBOTForPreTraining:
    torch.manual_seed(0)
    return DBOTForPreTraining(DBOTConfig(**tiny_config().to_dict() | settings))


def target_of(model, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.target(pixel_values, model._check_inputs(pixel_values, None))


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("run", PARITY)
def test_loss_predictions_and_targets_are_the_references(run):
    stored, model = PARITY[run], filled_model(run)
    pixel_values, noise = inputs_of(run)
    output = model(pixel_values, noise=noise)
    assert output.mask.int().tolist() == [row[1:] for row in stored["mask"]]
    assert [row[0] for row in stored["mask"]] == [1] * stored["batch"], "the class row counts"
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    close(output.logits, stored["pred"])
    model.config.normalize_target = False
    close(target_of(model, pixel_values), stored["teacher"])


@pytest.mark.parametrize("run", PARITY)
def test_gradients_are_the_references(run):
    stored, model = PARITY[run], filled_model(run)
    pixel_values, noise = inputs_of(run)
    model(pixel_values, noise=noise).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    seen = set()
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        ours = set(convert_official_weights({name: torch.zeros(3)}, model.config))
        ours = {n for n in ours if not n.startswith("teacher.")} - {"stage"}
        seen |= ours
        assert torch.stack([gradients[n].norm() for n in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    assert seen == gradients.keys()


def test_base_model_has_maes_parameters_and_another_head():
    """MAE's ViT-B/16 with its fixed tables has 111,907,840; a head of 768 instead of 768 values a patch, the same."""
    with torch.device("meta"):
        model = DBOTForPreTraining(DBOTConfig())
        reference = MAEForPreTraining(MAEConfig())
    student = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("teacher."))
    assert student == sum(p.numel() for p in reference.parameters())
    assert model.decoder.head.out_features == 768
    rates = [layer.drop_path.rate for layer in model.decoder.layers]
    assert rates == pytest.approx([0.2 * i / 7 for i in range(8)])
    rates = [module.rate for module in model.backbone.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])


def test_official_checkpoints_convert(tmp_path):
    from hf_masked.modeling.conversion import convert

    model, shapes = filled_model("normalized"), PARITY["normalized"]["parameters"]
    model.teacher.succeed(model)
    tables = {"pos_embed": model.backbone.embeddings.position_embeddings}
    tables["decoder_pos_embed"] = model.decoder.position_embeddings
    official = {name: value.detach() for name, value in (filled(shapes) | tables).items()}
    torch.save({"epoch": 1599, "model": official}, tmp_path / "dbot.pth")
    loaded = convert(get_variant("dbot"), tmp_path / "dbot.pth", config_of("normalized"))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    encoder = {name: value for name, value in official.items() if "decoder" not in name and name != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    loaded = convert(get_variant("dbot"), tmp_path / "encoder.pth", config_of("normalized"))
    assert type(loaded) is get_variant("dbot").model
    torch.save({"model": official | {"surplus": torch.zeros(1)}}, tmp_path / "dbot.pth")
    with pytest.raises(ValueError, match="surplus"):
        convert(get_variant("dbot"), tmp_path / "dbot.pth", config_of("normalized"))


def test_official_config_is_read_from_the_shapes():
    shapes = {
        "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.0.mlp.fc1.weight": (3072, 768),
        "blocks.11.mlp.fc1.weight": (3072, 768),
        "decoder_embed.weight": (512, 768),
        "decoder_blocks.7.mlp.fc1.weight": (2048, 512),
        "decoder_blocks.0.mlp.fc1.weight": (2048, 512),
    }
    config = official_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert config.to_diff_dict() == DBOTConfig().to_diff_dict()


# Section 11, check 1.


def test_a_stage_makes_the_student_the_teacher_and_starts_a_new_student():
    model = tiny().train()
    assert same(model.teacher.backbone, model.backbone), "the first teacher has the student's initial weights"
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    first_teacher = {name: p.clone() for name, p in model.teacher.named_parameters()}
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_twins()
    for name, value in model.teacher.named_parameters():
        assert torch.equal(value, first_teacher[name]), "bit for bit, after any number of steps"
        assert not value.requires_grad
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("teacher.")}
    model.start_stage()
    for name, value in model.teacher.named_parameters():
        assert torch.equal(value, trained[name])
    assert model.stage == 1 and not model.teacher.training and model.training
    fresh = new_student(model.config, 1)
    for name, value in fresh.named_parameters():
        now = model.get_parameter(name)
        assert torch.equal(now, value), name
        if now.requires_grad and value.std() > 0:
            assert not torch.equal(now, trained[name]), name
    # All of the student is one that was never trained, as a model of another seed is one.
    other = tiny().decoder.state_dict()
    for name, value in model.decoder.state_dict().items():
        if value.is_floating_point() and value.numel() > 200:
            assert value.std().item() == pytest.approx(other[name].std().item(), rel=0.2), name
            assert value.mean().item() == pytest.approx(other[name].mean().item(), abs=0.05), name


def test_new_students_depend_on_the_stage_alone():
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(DBOTForPreTraining(tiny_config()))
        before = torch.get_rng_state()
        models[-1].start_stage()
        assert torch.equal(torch.get_rng_state(), before), "a stage takes nothing from the generator"
    assert same(models[0].backbone, models[1].backbone) and same(models[0].decoder, models[1].decoder)
    assert not same(models[0].teacher, models[1].teacher)
    second = models[0].backbone.state_dict()["layers.0.mlp.fc1.weight"].clone()
    models[0].start_stage()
    assert not torch.equal(models[0].backbone.state_dict()["layers.0.mlp.fc1.weight"], second)


def test_first_teachers():
    model = tiny(initial_teacher="random")
    assert not same(model.teacher.backbone, model.backbone)
    shares = [p.std() / q.std() for p, q in zip(model.teacher.parameters(), model.parameters(), strict=False)]
    assert all(0.7 < share < 1.4 for share in shares if share.isfinite())
    torch.manual_seed(1)
    again = DBOTForPreTraining(model.config)
    assert same(again.teacher, model.teacher) and not same(again.backbone, model.backbone)


def test_teacher_begins_where_a_pretrained_encoder_does_and_is_loaded_as_saved(tmp_path):
    model = tiny(initial_teacher="patch_embedding")
    started = DBOTForPreTraining.from_backbone(model.backbone, initial_teacher="patch_embedding")
    assert (
        torch.equal(started.teacher.backbone.embeddings.cls_token, started.backbone.embeddings.cls_token)
        and not started.teacher.backbone.layers[0].mlp.fc2.weight.any()
    )
    model.start_stage()
    model.save_pretrained(tmp_path)
    loaded = DBOTForPreTraining.from_pretrained(tmp_path)
    assert loaded.stage == 1 and same(loaded.teacher, model.teacher)
    assert loaded.teacher.backbone.layers[0].mlp.fc2.weight.any()
    DBOTForImageClassification.from_pretrained(tmp_path, num_labels=3)


# Check 2.


@pytest.mark.parametrize("class_token", [True, False])
def test_loss_reads_masked_patches_and_the_class_token(class_token):
    model = tiny(loss_on_class_token=class_token)
    mask = torch.arange(16).expand(2, -1) % 4 > 0
    target, logits = torch.randn(2, 17, 32), torch.randn(2, 17, 32, requires_grad=True)
    loss = model.loss(logits, target, mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    read = gradient.abs().sum(dim=2) > 0
    assert torch.equal(read[:, 1:], mask) and (read[:, 0] == class_token).all()
    rows = F.smooth_l1_loss(logits, target, beta=2.0, reduction="none").mean(dim=2)
    chosen = rows[read]
    assert len(chosen) == 2 * (12 + class_token)
    torch.testing.assert_close(loss, chosen.mean())


def test_smooth_l1_is_quadratic_up_to_2():
    model, target = tiny(), torch.zeros(1, 2, 32)
    for error, expected in ((1.0, 0.25), (1.9, 0.9025), (2.0, 1.0), (3.0, 2.0), (-5.0, 4.0)):
        assert model.loss_per_row(target + error, target)[0].tolist() == pytest.approx([expected] * 2)
    model.config.loss = "cosine"
    rows = torch.randn(1, 2, 32)
    assert model.loss_per_row(rows, 3 * rows)[0].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert model.loss_per_row(rows, -rows)[0].tolist() == pytest.approx([2, 2])


# Check 3.


def test_targets_are_normalised_per_token_before_the_final_norm():
    model, pixel_values = tiny(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.teacher.backbone.layernorm.bias.fill_(7.0)
    target = target_of(model, pixel_values)
    model.config.normalize_target = False
    raw = target_of(model, pixel_values)
    assert target.shape == (2, 17, 32) and not target.requires_grad
    variance = raw.var(dim=-1)
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 17), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(dim=-1), variance / (variance + 1e-6))
    model.config.teacher_final_norm = True
    torch.testing.assert_close(target_of(model, pixel_values), model.teacher.backbone.layernorm(raw))


# Check 4.


@pytest.mark.parametrize("kind", [ViTConfig, DeiTConfig, Dinov2Config])
def test_patch_embedding_as_a_teacher_is_linear_in_the_patch(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = tiny(backbone_config=kind(**sizes).to_dict(), initial_teacher="patch_embedding", normalize_target=False)
    pixel_values, embeddings = torch.randn(2, 3, 32, 32), model.backbone.embeddings
    projected = embeddings.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
    prefix = 2 if kind is DeiTConfig else 1
    expected = projected + embeddings.position_embeddings[:, prefix:]
    torch.testing.assert_close(target_of(model, pixel_values)[:, prefix:], expected)
    torch.testing.assert_close(target_of(model, pixel_values)[0, 0], embeddings.cls_token[0, 0])
    model.config.normalize_target = True
    torch.testing.assert_close(target_of(model, pixel_values)[:, prefix:], normalize_patches(expected))
    model.start_stage()
    model.config.normalize_target = False
    assert (target_of(model, pixel_values)[:, prefix:] - expected).abs().max() > 0.1


# Check 5: tests/training/test_optimization.py tests the schedule itself.


def test_learning_rate_begins_anew_in_each_stage(tmp_path):
    settings = {"max_steps": 12, "warmup_steps": 0.25, "lr_scheduler_type": "cosine", "save_strategy": "no"}
    trainer = trainer_of(get_variant("dbot"), tmp_path, **settings)
    trainer.model.config.num_stages = 3
    trainer.train()
    # The rate of step k is logged with it.
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates[4:8] == pytest.approx(rates[:4]) and rates[8:] == pytest.approx(rates[:4])
    assert rates[0] == 0.0 and rates[1] == 1e-3 and rates[1] > rates[2] > rates[3] > 0


# Check 6.


def with_drop_path(folder: Path, **settings):
    trainer = trainer_of(get_variant("dbot"), folder, save_steps=1, **settings)
    for module in trainer.model.modules():
        if isinstance(module, DropPath):
            module.rate = 0.5
    trainer.starts = []
    start_stage = trainer.model.start_stage
    trainer.model.start_stage = lambda *args: (trainer.starts.append(trainer.state.global_step), start_stage(*args))
    return trainer


@pytest.mark.parametrize("step", [3, 4, 5])
def test_resume_before_at_and_after_the_start_of_a_stage(step, tmp_path):
    """Of 8 steps the second stage begins with the fifth: the checkpoint of step 4 holds the first stage's student."""
    whole = with_drop_path(tmp_path / "whole")
    whole.train()
    assert whole.starts == [4] and whole.model.stage == 1
    torch.manual_seed(123)
    resumed = with_drop_path(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert resumed.starts == ([4] if step <= 4 else [])
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    at_boundary = DBOTForPreTraining.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert at_boundary.stage == 0 and same(at_boundary.backbone, whole.model.teacher.backbone)


def test_a_new_run_from_complete_weights_has_all_its_stages(tmp_path):
    trainer = with_drop_path(tmp_path, max_steps=4)
    trainer.model.stage.fill_(1)
    trainer.train()
    assert trainer.starts == [2]


@pytest.mark.parametrize("reset", [False, True])
def test_moments_of_the_optimizer_are_kept_unless_asked(reset):
    model = tiny(reset_optimizer_state=reset)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    optimizer.step()
    for progress in (0.25, 0.49):
        model.training_progress = progress
        model.on_progress(optimizer)
        assert optimizer.state and model.stage == 0
    model.training_progress = 0.5
    model.on_progress(optimizer)
    assert model.stage == 1 and bool(optimizer.state) == (not reset)


def test_stages_begin_at_whole_steps_whatever_the_rounding():
    for steps in (7, 30, 49, 1000):
        model = tiny(num_stages=3)
        model.start_stage = lambda stage, optimizer, model=model: model.stage.fill_(stage)
        found = []
        for step in range(steps):
            model.training_progress = step / steps
            model.on_progress()
            found.append(model.stage.item())
        assert found == [3 * step // steps for step in range(steps)]


def test_plain_trainers_without_the_callback_are_told_that_no_stage_starts(caplog):
    for stages, calls_back, warns in ((2, False, True), (2, True, False), (1, False, False)):
        caplog.clear()
        model = tiny(num_stages=stages)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(3):
            model.train()
            model(torch.randn(2, 3, 32, 32)).loss.backward()
            optimizer.step()
            if calls_back:
                TrainingProgressCallback().on_optimizer_step(None, None, None, model=model)
        assert ("TrainingProgressCallback" in caplog.text) == warns


# Check 7.


@pytest.mark.parametrize(("form", "patch"), [(CLIPVisionConfig, 16), (Dinov2WithRegistersConfig, 4), (ViTConfig, 8)])
def test_teachers_of_another_width_patch_and_prefix(form, patch, tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 4 * patch}
    AutoModel.from_config(form(**sizes, patch_size=patch)).save_pretrained(tmp_path / "teacher")
    model = tiny(teacher=str(tmp_path / "teacher"), normalize_target=False, loss="cosine", **ONE_STAGE).train()
    pixel_values = torch.randn(2, 3, 32, 32)
    mask = torch.arange(16).expand(2, -1) % 4 > 0
    output = model(pixel_values, mask)
    assert output.logits.shape == output.target.shape == (2, 17, 24)
    rows = 1 - F.cosine_similarity(output.logits[:, 1:], output.target[:, 1:], dim=-1)
    torch.testing.assert_close(output.loss, rows[mask].mean())
    encoder = AutoModel.from_pretrained(tmp_path / "teacher").eval()
    pictures = F.interpolate(pixel_values, (4 * patch, 4 * patch), mode="bicubic", antialias=True)
    expected = encoder(pictures, output_hidden_states=True).hidden_states[-1][:, -16:]
    torch.testing.assert_close(output.target[:, 1:], expected, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.learning_rate_cycles() == 1 and not any("teacher" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "student")
    loaded = DBOTForPreTraining.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(loaded.eval()(pixel_values, mask).loss, model.eval()(pixel_values, mask).loss)
    assert {panel.shape for panel in model.pictures(pixel_values, mask).values()} == {pixel_values.shape}
    with pytest.raises(ValueError, match="one stage"):
        model.start_stage()


def test_first_teacher_may_be_a_pretrained_encoder_of_the_students_form(tmp_path):
    other = tiny()
    with torch.no_grad():
        other.backbone.embeddings.cls_token.fill_(0.5)
    other.backbone.save_pretrained(tmp_path / "encoder")
    model = tiny(initial_teacher=str(tmp_path / "encoder"))
    assert same(model.teacher.backbone, other.backbone) and not same(model.teacher.backbone, model.backbone)
    model.start_stage()
    model.save_pretrained(tmp_path / "student")
    (tmp_path / "encoder").rename(tmp_path / "gone")
    loaded = DBOTForPreTraining.from_pretrained(tmp_path / "student")
    assert same(loaded.teacher, model.teacher), "a checkpoint needs the first teacher no more"
    AutoModel.from_config(ViTConfig(hidden_size=24, num_attention_heads=2)).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="another form"):
        tiny(initial_teacher=str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="clip is neither"):
        tiny(initial_teacher="clip")


# Check 8.


def test_with_pixels_as_target_it_is_mae():
    backbone_config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    settings = {name: getattr(tiny_config(), name) for name in vars(tiny_config()) if name.startswith("decoder_")}
    mae = MAEForPreTraining(MAEConfig(backbone_config=backbone_config, norm_pix_loss=True, **settings)).eval()
    config = DBOTConfig(
        backbone_config=backbone_config, loss_on_class_token=False, smooth_l1_beta=1e6, drop_path_rate=0.0, **settings
    )
    model = DBOTForPreTraining(config).eval()
    model.load_state_dict(mae.state_dict(), strict=False)
    model.target = lambda pixels, grid: F.pad(normalize_patches(patchify(pixels, (4, 4))), (0, 0, 1, 0))
    pixel_values, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    ours, theirs = model(pixel_values, noise=noise), mae(pixel_values, noise=noise)
    torch.testing.assert_close(ours.logits[:, 1:], theirs.logits)
    # Far below beta the loss is the squared error over 2 beta.
    torch.testing.assert_close(ours.loss * 2e6, theirs.loss)


# And besides.


def test_drop_path_leaves_out_branches_of_some_samples_of_the_student_alone():
    torch.manual_seed(0)
    branch = DropPath(0.25).train()(torch.ones(4000, 3, 2))
    assert branch.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (branch == branch[:, :1, :1]).all() and branch.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(DropPath(0.25).eval()(branch), branch)
    model, pixel_values = tiny(drop_path_rate=0.5).train(), torch.randn(2, 3, 32, 32)
    assert torch.equal(target_of(model, pixel_values), target_of(model, pixel_values))
    outputs = torch.stack([encode_visible(model.backbone, pixel_values) for _ in range(8)])
    assert (outputs.std(dim=0) > 0).all()
    model.eval()
    assert torch.equal(encode_visible(model.backbone, pixel_values), encode_visible(model.backbone, pixel_values))


def test_export_of_a_model_with_drop_path_is_the_plain_backbone(tmp_path):
    from transformers import ViTModel

    model = tiny(drop_path_rate=0.5).eval()
    model.backbone.save_pretrained(tmp_path)
    plain, report = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixel_values = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(pixel_values)[0], model.backbone(pixel_values)[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_stages": 0}, ["num_stages", "0"]),
        ({"teacher_config": ViTConfig()}, ["num_stages=1", "initial_teacher"]),
        (ONE_STAGE | {"teacher_config": SwinConfig(num_channels=4)}, ["swin"]),
        (ONE_STAGE | {"teacher": "no/such"}, ["no/such"]),
        ({"loss": "l1"}, ["l1", "smooth_l1"]),
        ({"smooth_l1_beta": 0.0}, ["smooth_l1_beta", "0.0"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate", "1.0"]),
        ({"decoder_num_attention_heads": 5}, ["512", "5"]),
        ({"classifier_pooling": "max"}, ["max"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        DBOTConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_pictures_show_colours_and_agreement():
    model, pixel_values = tiny().eval(), torch.randn(3, 3, 32, 32)
    mask = torch.arange(16).expand(3, -1) % 4 > 0
    target = target_of(model, pixel_values)
    # A decoder that knows the answer in the upper half and its opposite in the lower one.
    sign = torch.where(torch.arange(17) < 9, 1.0, -1.0)[:, None]
    model.decoder.forward = lambda tokens, visible, grid: target * sign
    panels = {
        name: patchify(panel, (8, 8)).unflatten(2, (64, 3))
        for name, panel in model.pictures(pixel_values, mask).items()
    }
    for name, patches in panels.items():
        if name not in ("picture", "masked"):
            assert torch.equal(patches, patches[:, :, :1].expand_as(patches)), "one colour per patch"
    low, high = pixel_values.amin(dim=(2, 3)), pixel_values.amax(dim=(2, 3))
    cosine = panels["their cosine (masked patches)"][:, :, 0]
    bright = mask & (torch.arange(16) < 8)
    torch.testing.assert_close(cosine[bright], high[:, None].expand(-1, 16, -1)[bright])
    torch.testing.assert_close(cosine[~bright], low[:, None].expand(-1, 16, -1)[~bright])
    predicted, true = (panels[f"{name} features (components)"] for name in ("predicted", "teacher's"))
    torch.testing.assert_close(predicted[:, :8], true[:, :8])
    assert not torch.equal(predicted[:, 8:], true[:, 8:])
    assert torch.equal(panels["masked"].abs().amax(dim=(2, 3)) == 0, mask)


def test_principal_colours_follow_the_largest_variance():
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 9.0, 3.0, 0.1])
    features = torch.randn(4, 50, 4) * scale
    colours = principal_colours(features, 2)(features)
    assert colours.min() == 0 and colours.max() == 1 and colours.shape == (4, 50, 2)
    for channel, dimension in enumerate((1, 2)):
        pair = torch.stack([colours[..., channel].flatten(), features[..., dimension].flatten()])
        assert pair.corrcoef()[0, 1].abs() > 0.95
    assert principal_colours(features, 6)(features).shape == (4, 50, 6)


@pytest.mark.slow
def test_stages_learn_from_an_untrained_teacher():
    """Fashion-MNIST, two stages of 400 steps."""
    splits = fashion(4000, 1000)
    backbone_config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=4,
        num_channels=1,
        layer_norm_eps=1e-6,
    )
    decoder = {"decoder_hidden_size": 32, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64}
    model = tiny(backbone_config=backbone_config.to_dict(), **decoder).eval()
    pictures, untrained = splits[0][0], knn(model, splits)
    first = knn(pretrain(model, pictures, 400), splits)
    model.start_stage()
    second = knn(pretrain(model, pictures, 400), splits)
    # A thousand test pictures leave a deviation of 0.015.
    assert first > untrained + 0.04 and second > first - 0.03, (untrained, first, second)
