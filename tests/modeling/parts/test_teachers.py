"""Frozen teachers: every family of stock vision Transformers gives the same kind of features."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from hf_masked import MAEForPreTraining, MaskedImageProcessor
from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.parts import teachers
from hf_masked.modeling.parts.teachers import FrozenTeacher, check_teacher, teacher_form

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
FORMS = {
    "clip": (CLIPVisionConfig(**SIZES), 1),
    "vit": (ViTConfig(**SIZES), 1),
    "deit": (DeiTConfig(**SIZES), 2),
    "dinov2": (Dinov2Config(**SIZES, mlp_ratio=2), 1),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=4), 5),
    "siglip": (SiglipVisionConfig(**SIZES), 0),
    "beit": (BeitConfig(**SIZES, use_shared_relative_position_bias=True, use_mean_pooling=False), 1),
}


class Student(PreTrainedConfig):
    """The fields of a config that has a teacher."""

    teacher: str | None = None
    teacher_config: dict | PreTrainedConfig | None = None
    image_mean: float | list | None = None
    image_std: float | list | None = None
    num_channels: int = 3


def teacher_of(form=None, teacher=None, num_channels=3, image_mean=None, image_std=None, **arguments) -> FrozenTeacher:
    config = Student(
        teacher=teacher,
        teacher_config=teacher_form(teacher, form),
        num_channels=num_channels,
        image_mean=image_mean,
        image_std=image_std,
    )
    check_teacher(config, arguments.get("layer", -1))
    return FrozenTeacher(config, **arguments)


def saved(form, folder, mean=None, **settings):
    """A stock checkpoint, with an image processor where a mean is given."""
    torch.manual_seed(1)
    model = AutoModel.from_config(form).eval()
    model.save_pretrained(folder)
    if mean is not None:
        settings = {"image_mean": [mean] * 3, "image_std": [0.25] * 3, "do_normalize": True} | settings
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def block_outputs(model, pixel_values) -> list[torch.Tensor]:
    """The output of each block, by hooks."""
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    outputs = []
    for block in blocks:
        block.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if type(output) is tuple else output)
        )
    with torch.no_grad():
        model(pixel_values)
    return outputs


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("layer", [-1, 1])
def test_features_are_the_patch_tokens_of_the_named_block(family, layer, tmp_path):
    form, num_prefix = FORMS[family]
    model = saved(form, tmp_path)
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = block_outputs(model, pixel_values)[layer][:, num_prefix:]
    features = teacher_of(teacher=str(tmp_path), layer=layer).features(pixel_values, (4, 4))
    assert features.shape == (2, 16, 16) and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FORMS)
def test_final_norm_is_the_models_own(family, tmp_path):
    form, num_prefix = FORMS[family]
    model = saved(form, tmp_path)
    pixel_values = torch.randn(2, 3, 16, 16)
    tokens = block_outputs(model, pixel_values)[-1][:, num_prefix:]
    norm = model.post_layernorm if family in ("clip", "siglip") else model.layernorm
    features = teacher_of(teacher=str(tmp_path), final_norm=True).features(pixel_values, (4, 4))
    torch.testing.assert_close(features, norm(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FORMS)
def test_input_is_resized_to_the_students_grid(family, tmp_path):
    form, _ = FORMS[family]
    saved(form, tmp_path)
    teacher = teacher_of(teacher=str(tmp_path))
    # Patches of 8 on 48 x 32 pixels; the teacher's are of 4, so that it gets 24 x 16.
    pixel_values = torch.randn(2, 3, 48, 32)
    features = teacher.features(pixel_values, (6, 4))
    assert features.shape == (2, 24, 16)
    resized = F.interpolate(pixel_values, (24, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(features, teacher.features(resized, (6, 4)))


def test_feature_of_a_place_follows_the_place():
    """Raster order: a bright corner changes the token of that corner most."""
    for family, (form, _) in FORMS.items():
        # Attention mixes; the first block's output still bears its own patch above all.
        teacher = teacher_of(form, layer=0)
        plain = torch.zeros(1, 3, 16, 16)
        bright = plain.clone()
        bright[..., 4:8, 12:16] = 3.0  # row 1, column 3
        change = (teacher.features(bright, (4, 4)) - teacher.features(plain, (4, 4))).norm(dim=-1)
        assert change.argmax().item() == 1 * 4 + 3, family


def test_pictures_are_normalised_as_the_teachers_own(tmp_path):
    model = saved(FORMS["clip"][0], tmp_path, mean=0.4)
    pixels = torch.rand(2, 3, 16, 16)
    student_mean, student_std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    mine = (pixels - student_mean.view(-1, 1, 1)) / student_std.view(-1, 1, 1)
    teacher = teacher_of(teacher=str(tmp_path), image_mean=student_mean.tolist(), image_std=student_std.tolist())
    expected = block_outputs(model, (pixels - 0.4) / 0.25)[-1][:, 1:]
    torch.testing.assert_close(teacher.features(mine, (4, 4)), expected, rtol=1e-4, atol=1e-5)


def test_students_normalisation_is_its_processors_by_default():
    for channels in (1, 3, 4):
        processor = MaskedImageProcessor(size=16, num_channels=channels)
        assert teachers.normalization_of(Student(num_channels=channels)) == (processor.image_mean, processor.image_std)


def test_gray_pictures_are_repeated_and_colours_averaged(tmp_path):
    gray = torch.rand(2, 1, 16, 16)
    saved(FORMS["vit"][0], tmp_path, mean=0.4)
    teacher = teacher_of(teacher=str(tmp_path), num_channels=1, image_mean=0.5, image_std=0.5)
    colour = teacher_of(teacher=str(tmp_path), num_channels=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    repeated = gray.expand(-1, 3, -1, -1)
    torch.testing.assert_close(teacher.features(gray, (4, 4)), colour.features(repeated, (4, 4)))
    form = ViTConfig(**SIZES, num_channels=1)
    for_gray, for_colour = (
        teacher_of(form, num_channels=1),
        teacher_of(form, num_channels=3, image_mean=0.5, image_std=0.5),
    )
    torch.testing.assert_close(for_colour.features(repeated, (4, 4)), for_gray.features(gray, (4, 4)))
    # Nothing is known of either's normalisation: the student's, averaged as the channels are.
    normalized = gray * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1) + torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)
    picture = teacher_of(form, image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 0.2, 0.3]).pictures(normalized, (4, 4))
    pixels = normalized * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1) + torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    torch.testing.assert_close(picture, (pixels.mean(dim=1, keepdim=True) - 0.5) / 0.2)


def test_checkpoints_of_this_package_are_teachers(tmp_path):
    model = MAEForPreTraining(mae.tiny_config()).eval()
    model.save_pretrained(tmp_path)
    teacher = teacher_of(teacher=str(tmp_path))
    assert teacher.config.teacher_config.model_type == "vit"
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.backbone(pixel_values, output_hidden_states=True).last_hidden_state[:, 1:]
    features = teacher_of(teacher=str(tmp_path), final_norm=True).features(pixel_values, (4, 4))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_vit_mae_is_its_vit_and_sees_everything(tmp_path):
    sizes = {**SIZES, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    model = saved(ViTMAEConfig(**sizes, mask_ratio=0.0), tmp_path)
    assert teacher_form(str(tmp_path), None).model_type == "vit"
    pixel_values = torch.randn(2, 3, 16, 16)
    # Without masking, noise in raster order leaves the tokens in their order.
    noise = torch.arange(16).expand(2, -1) / 16
    with torch.no_grad():
        expected = model(pixel_values, noise=noise).last_hidden_state[:, 1:]
    features = teacher_of(teacher=str(tmp_path), final_norm=True).features(pixel_values, (4, 4))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_untrained_teachers_are_the_same_every_time_and_leave_the_generator_alone():
    pixel_values = torch.randn(2, 3, 16, 16)
    torch.manual_seed(5)
    first = teacher_of(FORMS["vit"][0]).features(pixel_values, (4, 4))
    drawn = torch.rand(1)
    torch.manual_seed(6)
    assert torch.equal(teacher_of(FORMS["vit"][0]).features(pixel_values, (4, 4)), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_blocks_above_the_wanted_one_are_not_kept(tmp_path):
    saved(FORMS["vit"][0], tmp_path)
    teacher = teacher_of(teacher=str(tmp_path), layer=0)
    assert len(teacher.prepare(torch.device("cpu")).layers) == 1


def test_float32_whatever_the_students_type():
    teacher = teacher_of(FORMS["vit"][0])
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = teacher.features(pixel_values.to(torch.bfloat16).float(), (4, 4))
    assert torch.equal(teacher.features(pixel_values.to(torch.bfloat16), (4, 4)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher.features(pixel_values, (4, 4)).dtype == torch.float32


def test_missing_teachers_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="neither a folder with a checkpoint nor a Hub id") as error:
        teacher_form(str(tmp_path / "nowhere"), None)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="give `teacher`"):
        teacher_form(None, None)


@pytest.mark.parametrize("form", [ResNetConfig(), SwinConfig()])
def test_teachers_without_patch_tokens_are_refused(form):
    with pytest.raises(ValueError, match="has no patch tokens"):
        teacher_of(form)


def test_wrong_layers_and_channels_are_named():
    with pytest.raises(ValueError, match=r"has 3 blocks.* no block 3"):
        teacher_of(FORMS["vit"][0], layer=3)
    with pytest.raises(ValueError, match="takes 3 channels and the student 4"):
        teacher_of(FORMS["vit"][0], num_channels=4)


def test_impossible_grid_says_what_would_fit(tmp_path):
    # Stock ViTs take the positions of a rectangle for those of a square when they interpolate.
    teacher = teacher_of(ViTConfig(**SIZES | {"image_size": [16, 32]}))
    assert teacher.features(torch.randn(1, 3, 16, 32), (4, 8)).shape == (1, 32, 16)
    with pytest.raises(ValueError, match="give the student 4 x 8 patches"):
        teacher.features(torch.randn(1, 3, 32, 32), (8, 8))


def test_checkpoints_that_do_not_hold_the_encoder_are_refused(tmp_path):
    model = saved(FORMS["vit"][0], tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if "layers.2" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="does not hold all of a vit"):
        teacher_of(teacher=str(tmp_path)).features(torch.randn(1, 3, 16, 16), (4, 4))


def test_other_checkpoint_than_the_config_says_is_refused(tmp_path):
    MAEForPreTraining(mae.tiny_config()).save_pretrained(tmp_path)
    config = Student(teacher=str(tmp_path), teacher_config=FORMS["vit"][0])
    with pytest.raises(ValueError, match=r"32 wide .* made for one of 16"):
        FrozenTeacher(config).features(torch.randn(1, 3, 16, 16), (4, 4))


def test_another_config_around_the_same_form_changes_nothing():
    form = FORMS["clip"][0]
    teacher = teacher_of(form)
    encoder = teacher.prepare(torch.device("cpu"))
    before = encoder.config._attn_implementation
    form._attn_implementation = None  # as the making of another config that holds it does
    assert before is not None and encoder.config._attn_implementation == before
