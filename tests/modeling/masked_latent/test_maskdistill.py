"""MaskDistill: every check of its spec (section 11), and its losses against an unofficial implementation."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_masked import (
    MAEConfig,
    MAEForPreTraining,
    MaskDistillConfig,
    MaskDistillForPreTraining,
    MaskDistillModel,
    MaskedImageProcessor,
    SimMIMConfig,
    SimMIMForPreTraining,
)
from hf_masked.modeling.parts.beit import beit_vit
from hf_masked.modeling.parts.patches import unpatchify, visible_indices
from hf_masked.training.export import export_encoder
from hf_masked.training.optimization import parameter_groups
from tests.modeling.masked_image.short_runs import fashion, knn, pretrain
from tests.parity.fill import filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "maskdistill.json").read_text())

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEACHER = SIZES | {"hidden_size": 48, "num_hidden_layers": 3}
TEACHERS = {
    "clip": CLIPVisionConfig(**TEACHER),
    "vit": ViTConfig(**TEACHER),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**TEACHER, mlp_ratio=2),
    "siglip": SiglipVisionConfig(**TEACHER),
    "beit": BeitConfig(**TEACHER, use_absolute_position_embeddings=True),
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
STUDENTS = {
    "dense": {},
    "sparse": {"backbone_config": ViTConfig(**SIZES, layer_norm_eps=1e-6), "mask_ratio": 0.75, "mask_kind": "random"},
}


def dense_vit(**settings) -> BeitConfig:
    return beit_vit(**SIZES | {"drop_path_rate": 0.0} | settings)


def small_model(student: str = "dense", seed: int = 0, **settings) -> MaskDistillForPreTraining:
    torch.manual_seed(seed)
    defaults = {"backbone_config": dense_vit(), "teacher": None, "teacher_config": TEACHERS["clip"]} | DECODER
    return MaskDistillForPreTraining(MaskDistillConfig(**defaults | STUDENTS[student] | settings))


# An unofficial implementation: `src/loss.py` of bwconrad/masked-distillation


@pytest.mark.parametrize("name", PARITY["losses"])
def test_loss_is_that_of_the_unofficial_implementation(name):
    loss, beta = name.rsplit("_", 1)
    model = small_model(loss=loss, smooth_l1_beta=float(beta))
    prediction, features = filled_pixels((2, 16, 12), "prediction"), 5 * filled_pixels((2, 16, 12), "teacher") + 1
    model.teacher.features = lambda *_: features
    mask = filled_noise(2, 16, "mask") < 0.4
    # It divides by the unbiased deviation, where a layer norm takes the biased one.
    target = model.target(torch.zeros(2, 3, 32, 32), (4, 4)) * math.sqrt(11 / 12)
    assert model.loss(prediction, target, mask).item() == pytest.approx(PARITY["losses"][name], rel=1e-5)


# The spec's section 11


@pytest.mark.parametrize("student", STUDENTS)
def test_1_visible_positions_get_no_loss(student):
    model = small_model(student)
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values)
    target = model.target(pixel_values, (4, 4))
    changed = torch.where(output.mask.unsqueeze(-1), output.logits, torch.randn_like(output.logits))
    assert torch.equal(model.loss(changed, target, output.mask), output.loss)
    output.loss.backward()
    token = model.backbone.embeddings.mask_token if student == "dense" else model.head.mask_token
    assert token.grad.abs().max() > 0


def test_2_targets_have_mean_0_and_variance_1_whatever_the_teachers_scale():
    model = small_model().eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    target = model.target(pixel_values, (4, 4))
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(dim=-1, unbiased=False), torch.ones(2, 16), rtol=1e-3, atol=0)
    expected = model(pixel_values).loss
    features = model.teacher.features(pixel_values, (4, 4))
    # a * T + b with another a > 0 and b for each token.
    model.teacher.features = lambda *_: features * (1 + 9 * torch.rand(2, 16, 1)) + torch.randn(2, 16, 1)
    torch.testing.assert_close(model(pixel_values).loss, expected, rtol=1e-4, atol=0)
    plain = small_model(target_normalization="none").eval()
    before = plain(pixel_values).loss
    plain.teacher.features = lambda *_: 3 * features
    assert abs(plain(pixel_values).loss - before) > 0.1 * before, "without N the scale counts"


def test_3_teacher_is_frozen_nowhere_in_the_student_and_found_again(tmp_path):
    torch.manual_seed(1)
    AutoModel.from_config(TEACHERS["vit"]).save_pretrained(tmp_path / "teacher")
    model = small_model(teacher=str(tmp_path / "teacher"), teacher_config=None)
    model.train()(torch.randn(2, 3, 32, 32)).loss.backward()
    teacher = model.teacher.prepare(torch.device("cpu"))
    assert not teacher.training and all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    ours = {id(parameter) for parameter in teacher.parameters()}
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.05, layer_decay=None)
    assert not ours & {id(parameter) for group in groups for parameter in group["params"]}
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "head"}
    model.save_pretrained(tmp_path / "student")
    loaded = MaskDistillForPreTraining.from_pretrained(tmp_path / "student")
    pixel_values = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(pixel_values).loss, model.eval()(pixel_values).loss)


def test_3_students_whose_teacher_has_gone_load_and_say_so_when_the_loss_needs_it(tmp_path):
    AutoModel.from_config(TEACHERS["vit"]).save_pretrained(tmp_path / "teacher")
    small_model(teacher=str(tmp_path / "teacher"), teacher_config=None).save_pretrained(tmp_path / "student")
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    loaded = MaskDistillForPreTraining.from_pretrained(tmp_path / "student")
    assert loaded(torch.randn(2, 3, 32, 32), return_loss=False).logits.shape == (2, 16, 48)
    with pytest.raises(ValueError, match="neither a folder with a checkpoint nor a Hub id"):
        loaded(torch.randn(2, 3, 32, 32))


def test_4_dense_students_of_pixels_are_simmim():
    settings = {"teacher": "pixels", "teacher_config": None, "target_normalization": "none", "loss": "l1"}
    ours = small_model(**settings).eval()
    theirs = SimMIMForPreTraining(SimMIMConfig(backbone_config=dense_vit())).eval()
    theirs.backbone.load_state_dict(ours.backbone.state_dict())
    with torch.no_grad():
        # Its convolution counts (channel, row, column), patches (row, column, channel).
        order = torch.arange(192).view(8, 8, 3).permute(2, 0, 1).flatten()
        theirs.decoder[0].weight.copy_(ours.head.weight[order][..., None, None])
        theirs.decoder[0].bias.copy_(ours.head.bias[order])
    pixel_values = torch.randn(2, 3, 32, 32)
    output = ours(pixel_values)
    expected = theirs(pixel_values, bool_masked_pos=output.mask)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        unpatchify(output.logits, (4, 4), (8, 8)), expected.reconstruction, rtol=1e-5, atol=1e-6
    )


def test_4_sparse_students_of_pixels_are_mae():
    settings = {"teacher": "pixels", "teacher_config": None, "target_normalization": "none", "loss": "l2"}
    ours = small_model("sparse", **settings).eval()
    config = MAEConfig(backbone_config=STUDENTS["sparse"]["backbone_config"], norm_pix_loss=False, **DECODER)
    theirs = MAEForPreTraining(config).eval()
    weights = {name.replace("head.", "decoder.", 1) if name.startswith("head.") else name: value
               for name, value in ours.state_dict().items() if "embeddings.mask_token" not in name}  # fmt: skip
    theirs.load_state_dict(weights)
    pixel_values, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    torch.testing.assert_close(ours(pixel_values, noise=noise).loss, theirs(pixel_values, noise=noise).loss)


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("family", TEACHERS)
def test_5_teachers_of_five_families(family, student):
    model = small_model(student, teacher_config=TEACHERS[family])
    output = model(torch.randn(2, 3, 32, 32))
    assert output.logits.shape == (2, 16, 48) and output.loss.isfinite()


def test_5_other_grids_are_resized_and_impossible_ones_refused():
    # Patches of 4: the student's 4 x 4 patches ask for teacher's pictures of 16 pixels.
    model = small_model(teacher_config=ViTConfig(**TEACHER | {"patch_size": 4, "image_size": 32}))
    assert model(torch.randn(2, 3, 32, 32)).loss.isfinite()
    rectangle = small_model(teacher_config=ViTConfig(**TEACHER | {"image_size": [32, 64]}))
    with pytest.raises(ValueError, match="give the student 4 x 8 patches"):
        rectangle(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="has no patch tokens"):
        small_model(teacher_config=SwinConfig())


def test_6_a_student_that_sees_everything_can_reach_its_teacher():
    """Positions of student and teacher are the same: of a copy of the teacher the identity makes the target."""
    form = dense_vit(hidden_size=48)
    model = small_model(backbone_config=form, teacher_config=form, loss_on="all", mask_ratio=0.0, loss="l2").eval()
    model.backbone.load_state_dict(model.teacher.prepare(torch.device("cpu")).state_dict(), strict=False)
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(48))
        model.head.bias.zero_()
    pixel_values = torch.randn(2, 3, 32, 32)
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    assert model(pixel_values, nothing).loss < 1e-8
    features = model.teacher.features
    model.teacher.features = lambda *arguments: features(*arguments).roll(1, dims=1)
    assert model(pixel_values, nothing).loss > 0.1, "the teacher's tokens in other places"


def test_7_dense_and_sparse_students_mean_the_same_patches():
    pixel_values = torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, 16).argsort(dim=1) < 12
    changed = torch.where(mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3), 0.0, pixel_values)
    for student in STUDENTS:
        model = small_model(student).eval()
        first, second = model(pixel_values, mask), model(changed, mask)
        torch.testing.assert_close(first.logits, second.logits)
        assert torch.equal(first.mask, mask)
        seen = model(torch.where(changed == 0, pixel_values, 0.0), mask)
        assert not torch.allclose(first.logits, seen.logits)
    sparse = small_model("sparse").eval()
    visible = visible_indices(mask)
    encoder = MaskDistillModel(sparse.config).eval()
    encoder.backbone.load_state_dict(sparse.backbone.state_dict())
    assert encoder(pixel_values, mask).last_hidden_state.shape[1] == 1 + visible.shape[1]


@pytest.mark.slow
def test_experiment_students_learn_from_a_teacher_with_labels_more_than_from_pixels(tmp_path):
    """A teacher that has seen the labels of five classes; students see none. kNN accuracy over all ten."""
    (pictures, labels), test = fashion(train=2000, test=1000)
    splits = [(pictures, labels), test]
    torch.manual_seed(0)
    form = ViTConfig(**SIZES | {"hidden_size": 64}, num_channels=1, num_labels=5)
    classifier, known = ViTForImageClassification(form), labels < 5
    optimizer, generator = torch.optim.AdamW(classifier.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(300):
        chosen = torch.randint(int(known.sum()), (64,), generator=generator)
        classifier(pictures[known][chosen], labels=labels[known][chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier.save_pretrained(tmp_path)

    def accuracy(steps: int = 300, scale: float = 1.0, **settings) -> float:
        """Of a student; `scale` is that of one of the teacher's 64 channels."""
        backbone_config = dense_vit(num_channels=1, layer_scale_init_value=1.0)
        model = small_model(
            backbone_config=backbone_config,
            mask_kind="random",
            **{"teacher": str(tmp_path), "teacher_config": None} | settings,
        )
        if scale != 1.0:
            features, scales = model.teacher.features, torch.ones(64).index_fill(0, torch.tensor([0]), scale)
            model.teacher.features = lambda *arguments: features(*arguments) * scales
        return knn(pretrain(model, pictures, steps=steps, learning_rate=2e-3) if steps else model.eval(), splits)

    figures = {
        "random": accuracy(steps=0),
        "student": accuracy(),
        "pixels": accuracy(teacher="pixels", target_normalization="none", loss="l1"),
        "without N": accuracy(target_normalization="none", scale=30.0),
    }
    print(figures)
    assert figures["student"] > max(figures["random"], figures["pixels"], figures["without N"]) + 0.02, figures


# Settings and errors


def test_papers_student_and_teacher_are_the_defaults():
    config = MaskDistillConfig()
    assert (config.teacher_config.hidden_size, config.teacher_config.patch_size) == (768, 16)
    assert config.backbone_config.use_shared_relative_position_bias and not config.is_sparse


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_layer": 3}, "no block 3"),
        ({"loss": "l3"}, "loss is 'l3'"),
        ({"loss_on": "visible"}, "loss_on is 'visible'"),
        ({"target_normalization": "batch"}, "target_normalization is 'batch'"),
        ({"smooth_l1_beta": 0.0}, "smooth_l1_beta is 0.0"),
        ({"teacher_config": None}, "give `teacher`"),
        ({"backbone_config": BeitConfig(**SIZES)}, "no positions"),
        (STUDENTS["sparse"] | {"decoder_num_attention_heads": 3}, "no multiple"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(**settings)


@pytest.mark.parametrize("loss", ["cosine", "l2"])
def test_other_losses_and_normalisations(loss):
    model = small_model(loss=loss, target_normalization="l2")
    pixel_values = torch.randn(2, 3, 32, 32)
    output, target = model(pixel_values), model.target(pixel_values, (4, 4))
    torch.testing.assert_close(target.norm(dim=-1), torch.ones(2, 16))
    p, t = output.logits[output.mask], target[output.mask]
    expected = 1 - F.cosine_similarity(p, t).mean() if loss == "cosine" else F.mse_loss(p, t)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("student", STUDENTS)
def test_gradients_training_and_export_of_both_students(student, tmp_path):
    """What the conformance suite checks of the dense one."""
    model = small_model(student).train()
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.abs().max() > 0), name
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    noise = torch.rand(2, 16 + 4 * 32)
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(pixel_values, noise=noise).loss, model(pixel_values, noise=noise).loss)
    model.save_pretrained(tmp_path / "student")
    loaded = MaskDistillForPreTraining.from_pretrained(tmp_path / "student")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    export_encoder(model, MaskedImageProcessor(**model.config.processor_settings()), tmp_path / "plain")
    plain, report = AutoModel.from_pretrained(tmp_path / "plain", add_pooling_layer=False, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(plain, BeitModel) == (student == "dense")


@pytest.mark.parametrize("teacher", ["pixels", None])
def test_pictures_show_predictions_under_the_mask_only(teacher):
    settings = {"teacher_config": None} if teacher else {}
    model = small_model(teacher=teacher, target_normalization="none", **settings).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    panels, mask = model.pictures(pixel_values), model(pixel_values).mask
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    assert list(panels) == ["picture", "masked", "prediction", "target"]
    assert torch.equal(panels["prediction"][~hidden], panels["target"][~hidden])
    assert not torch.allclose(panels["prediction"][hidden], panels["target"][hidden])
    if teacher:
        assert torch.equal(panels["target"], pixel_values)
