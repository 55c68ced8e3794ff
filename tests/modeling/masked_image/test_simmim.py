"""SimMIM against its reference, transformers' own class, and every check of its spec (section 11)."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedImageModeling,
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitModel,
    SwinConfig,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Config,
    ViTConfig,
)

from hf_masked import MaskedImageProcessor, SimMIMConfig, SimMIMForPreTraining, SimMIMModel
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.conversion import convert, read_official
from hf_masked.modeling.masked_image.simmim import (
    convert_official_weights,
    official_config,
    tiny_config,
)
from hf_masked.modeling.parts.beit import beit_vit
from hf_masked.modeling.registry import get_variant
from hf_masked.processing.masks import make_mask
from hf_masked.randomness import given_draw
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.export import export_encoder
from hf_masked.training.optimization import parameter_groups
from hf_masked.training.trainer import PreTrainer
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "simmim.json").read_text())


def small_beit(**settings) -> BeitConfig:
    return beit_vit(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 64,
            "patch_size": 16,
            "drop_path_rate": 0.0,
        }
        | settings
    )


def small_swin(**settings) -> SwinConfig:
    """Two stages: cells of 8 pixels, 8 x 4 x 4 of them in windows of 4."""
    return SwinConfig(
        **{
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "drop_path_rate": 0.0,
        }
        | settings
    )


BACKBONES = {"beit": small_beit, "swin": small_swin}


def small_model(kind: str, seed: int = 0, **settings) -> SimMIMForPreTraining:
    torch.manual_seed(seed)
    return SimMIMForPreTraining(SimMIMConfig(backbone_config=BACKBONES[kind](), **settings))


def pixel_mask(model: SimMIMForPreTraining, mask: torch.Tensor) -> torch.Tensor:
    """bool (batch, 1, height, width) of the masked pixels."""
    patch = model.config.backbone_config.patch_size
    grid = math.isqrt(mask.shape[1])
    return mask.view(-1, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


# The reference, through the stored values


def official_shapes(run: str) -> dict[str, torch.Tensor]:
    """A checkpoint of the reference as `torch.load` gives it: its parameters, filled, and its buffers."""
    stored = PARITY["pretraining"][run]
    return filled(stored["parameters"]) | {name: torch.zeros(shape) for name, shape in stored["buffers"].items()}


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    official = official_shapes(run)
    config = official_config(official)
    config.mask_patch_size = stored["config"]["mask_patch_size"]
    model = SimMIMForPreTraining(config).eval()
    model.load_state_dict(convert_official_weights(official, config))
    size = stored["config"]["img_size"]
    squares = (size // config.square_size) ** 2
    output = model(
        filled_pixels((stored["batch"], 3, size, size), f"{run}.pixels"),
        noise=filled_noise(stored["batch"], squares, f"{run}.noise"),
    )
    return stored, model, output


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_and_outputs_are_the_references(run):
    stored, model, output = run_as_reference(run)
    assert output.mask.int().tolist() == stored["mask"]
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    close(model.feature_map(output.last_hidden_state, output.reconstruction.shape[-2:]), stored["features"])
    close(output.reconstruction[0], stored["reconstruction"])


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
def test_official_config_is_read_from_the_shapes(run):
    reference = PARITY["pretraining"][run]["config"]
    config = official_config(official_shapes(run))
    backbone = config.backbone_config
    assert backbone.image_size == reference["img_size"] and backbone.patch_size == reference["patch_size"]
    assert config.encoder_stride == reference["encoder_stride"]
    assert backbone.layer_norm_eps == reference["layer_norm_eps"]
    if run == "vit":
        assert backbone.num_hidden_layers == reference["depth"] and backbone.num_attention_heads == 4
        assert backbone.use_shared_relative_position_bias and not backbone.use_mean_pooling
    else:
        assert list(backbone.depths) == reference["depths"] and list(backbone.num_heads) == reference["num_heads"]
        assert backbone.window_size == reference["window_size"] and backbone.mlp_ratio == reference["mlp_ratio"]


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_official_file_converts_strictly(run, tmp_path):
    official = official_shapes(run)
    torch.save({"model": official, "epoch": 799}, tmp_path / "ckpt.pth")
    model = convert(get_variant("simmim"), tmp_path / "ckpt.pth")
    assert torch.equal(model.backbone.embeddings.mask_token, official["encoder.mask_token"])
    torch.save({"model": official | {"encoder.extra": torch.zeros(1)}}, tmp_path / "ckpt.pth")
    with pytest.raises(ValueError, match=r"left over: encoder\.extra"):
        convert(get_variant("simmim"), tmp_path / "ckpt.pth")


def test_training_checkpoints_of_the_reference_are_read(tmp_path, monkeypatch):
    """They hold their settings as a yacs CfgNode, which is a dict with attributes."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    settings = module.CfgNode(DATA=module.CfgNode(IMG_SIZE=192))
    settings.__dict__["__immutable__"] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": {"w": torch.ones(2)}, "max_accuracy": 0.0, "config": settings}, tmp_path / "ckpt.pth")
    assert "yacs" not in sys.modules
    assert read_official(tmp_path / "ckpt.pth")["w"].tolist() == [1.0, 1.0]


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match="no SimMIM pretraining"):
        official_config({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)})


# transformers' own class


def transformers_twin(model: SimMIMForPreTraining) -> SwinForMaskedImageModeling:
    """transformers' class with our weights."""
    config = SwinConfig(**model.config.backbone_config.to_dict() | {"encoder_stride": model.config.encoder_stride})
    twin = SwinForMaskedImageModeling(config).eval()
    weights = {name.replace("backbone.", "swin."): value for name, value in model.state_dict().items()}
    twin.load_state_dict(weights)
    return twin


def test_loss_and_pixels_are_those_of_transformers_swin():
    model = small_model("swin").eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    ours = model(pixel_values)
    theirs = transformers_twin(model)(pixel_values, bool_masked_pos=ours.mask)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)


def test_starts_from_transformers_masked_model_and_keeps_its_mask_token(tmp_path):
    theirs = transformers_twin(small_model("swin", seed=1))
    theirs.save_pretrained(tmp_path)
    started = SimMIMForPreTraining.from_backbone(str(tmp_path))
    for name, value in theirs.swin.state_dict().items():
        assert torch.equal(started.backbone.state_dict()[name], value), name
    assert theirs.swin.embeddings.mask_token.abs().max() > 0


# The spec's section 11


@pytest.mark.parametrize(
    ("backbone_config", "patches", "squares", "count"),
    [
        (SwinConfig(image_size=192, window_size=6, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1] * 4), 8, 36, 22),
        (beit_vit(num_hidden_layers=1), 2, 49, 30),
    ],
)
def test_counts_and_squares_of_the_papers_encoders(backbone_config, patches, squares, count):
    config = SimMIMConfig(backbone_config=backbone_config)
    assert config.square_size == 32 and config.mask_arguments() == {"unit": patches}
    processor = MaskedImageProcessor(**config.processor_settings())
    size = config.image_size
    batch = processor([torch.zeros(3, size, size, dtype=torch.uint8)] * 3, seed=0)
    drawn = SimMIMForPreTraining(config).draw_mask(batch["pixel_values"], processor.mask_grid)
    for mask in (batch["bool_masked_pos"], drawn):
        grid = mask.view(3, *processor.mask_grid)
        cells = grid.unfold(1, patches, patches).unfold(2, patches, patches).flatten(3)
        assert (cells == cells[..., :1]).all() and cells[..., 0].flatten(1).shape[1] == squares
        assert cells[..., 0].sum(dim=(1, 2)).tolist() == [count] * 3


@pytest.mark.parametrize("kind", BACKBONES)
def test_loss_is_the_papers_equation_written_as_loops(kind):
    model = small_model(kind)
    pixel_values = torch.randn(2, 3, 64, 64)
    output = model(pixel_values)
    total, count = 0.0, 0
    for sample, _, row, column in pixel_mask(model, output.mask).nonzero().tolist():
        total += (output.reconstruction - pixel_values)[sample, :, row, column].abs().sum()
        count += 1
    torch.testing.assert_close(output.loss, total / (count + 1e-5) / 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", BACKBONES)
def test_loss_reads_masked_pixels_only(kind):
    model = small_model(kind)
    output = model(torch.randn(2, 3, 64, 64))
    output.reconstruction.retain_grad()
    output.loss.backward()
    hidden = pixel_mask(model, output.mask).expand(-1, 3, -1, -1)
    assert output.reconstruction.grad[~hidden].abs().max() == 0
    assert output.reconstruction.grad[hidden].abs().min() > 0


@pytest.mark.parametrize("kind", BACKBONES)
def test_nothing_masked_is_no_loss_and_the_plain_encoder(kind):
    model = small_model(kind).eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    patches = (64 // model.config.backbone_config.patch_size) ** 2
    output = model(pixel_values, bool_masked_pos=torch.zeros(2, patches, dtype=torch.bool))
    assert output.loss == 0
    plain = model.backbone(pixel_values).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state, plain, rtol=0, atol=1e-6)
    encoder = SimMIMModel(model.config).eval()
    encoder.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("decoder.")})
    assert torch.equal(encoder(pixel_values).last_hidden_state, plain)
    assert torch.equal(encoder(pixel_values, model(pixel_values).mask)[0], model(pixel_values).last_hidden_state)


@pytest.mark.parametrize("kind", BACKBONES)
def test_masked_pixels_are_not_seen(kind):
    model = small_model(kind).eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    output = model(pixel_values)
    hidden = pixel_mask(model, output.mask)
    changed = torch.where(hidden, torch.randn_like(pixel_values), pixel_values)
    other = model(changed, bool_masked_pos=output.mask)
    assert torch.equal(other.reconstruction, output.reconstruction)
    assert not torch.equal(other.loss, output.loss)


def test_sizes_of_table_head_and_swin():
    with torch.device("meta"):
        vit = SimMIMForPreTraining(SimMIMConfig())
        swin_b = SwinConfig(
            image_size=192, window_size=6, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]
        )
        swin = SimMIMForPreTraining(SimMIMConfig(backbone_config=swin_b))
    assert vit.backbone.shared_position_bias.relative_position_bias_table.shape == (732, 12)
    assert sum(p.numel() for p in vit.decoder.parameters()) == 590_592
    assert sum(p.numel() for p in swin.decoder.parameters()) == 3_148_800
    assert sum(p.numel() for p in swin.parameters()) == 89_874_104


def test_training_beats_the_mean_colour_of_the_visible_pixels():
    """A few hundred steps on stripes: the masked L1 falls below that of predicting each picture's mean colour."""
    torch.manual_seed(0)
    model = SimMIMForPreTraining(tiny_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch():
        across = torch.arange(32) / 32
        phase, count = torch.rand(32, 1, 1), torch.randint(1, 3, (32, 1, 1))
        wave = (2 * torch.pi * (count * across[None, None, :] + count * across[None, :, None] + phase)).sin()
        return wave[:, None].expand(-1, 3, -1, -1)

    for _ in range(150):
        model(batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pictures = batch()
    with torch.no_grad():
        trained = model.eval()(pictures)
    mean_colour = pictures.mean(dim=(2, 3), keepdim=True).expand_as(pictures)
    assert trained.loss < 0.5 * model.loss(pictures, mean_colour, trained.mask)


# Beyond the spec: initialisation, weight decay, configs, checkpoints


def std_and_bound(tensor: torch.Tensor) -> tuple[float, float]:
    return tensor.std().item(), tensor.abs().max().item()


def test_initialisation_of_the_vit_is_the_references():
    model = small_model("beit")
    # A normal of deviation 0.02 truncated at one deviation has the deviation 0.02 * 0.5396.
    narrow = pytest.approx(0.02 * 0.5396, rel=0.03)
    embeddings, layers = model.backbone.embeddings, model.backbone.layers
    for weight in (
        layers[1].attention.q_proj.weight,
        layers[1].mlp.fc1.weight,
        embeddings.patch_embeddings.projection.weight,
    ):
        std, bound = std_and_bound(weight)
        assert std == narrow and 0.0198 < bound <= 0.02
    for number, layer in enumerate(layers, start=1):
        for weight in (layer.attention.o_proj.weight, layer.mlp.fc2.weight):
            assert std_and_bound(weight * math.sqrt(2 * number))[0] == narrow
    for token in (embeddings.cls_token, embeddings.mask_token):
        assert 0.005 < token.std() < 0.015 and token.abs().max() <= 0.02
    assert all((layer.lambda_1 == 0.1).all() and (layer.lambda_2 == 0.1).all() for layer in layers)
    assert model.backbone.shared_position_bias.relative_position_bias_table.abs().max() == 0
    assert layers[0].attention.q_proj.bias.abs().max() == 0 and layers[0].attention.k_proj.bias is None


def test_initialisation_of_swin_is_the_references():
    model = small_model("swin")
    embeddings = model.backbone.embeddings
    attention = model.backbone.encoder.layers[1].blocks[0].attention
    normal = pytest.approx(0.02, rel=0.1)
    assert attention.q_proj.weight.std().item() == normal and attention.q_proj.bias.abs().max() == 0
    assert attention.relative_position_bias.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.2)
    assert 0.01 < embeddings.mask_token.std() < 0.03
    # torch's own: uniform within 1 / sqrt(fan-in)
    for conv in (embeddings.patch_embeddings.projection, model.decoder[0]):
        bound = 1 / math.sqrt(conv.weight[0].numel())
        assert 0.95 * bound < conv.weight.abs().max() <= bound and 0 < conv.bias.abs().max() <= bound


@pytest.mark.parametrize(
    ("kind", "exempt"),
    [
        ("beit", {"embeddings.cls_token", "embeddings.mask_token"}),
        (
            "swin",
            {"embeddings.mask_token"}
            | {
                f"encoder.layers.{s}.blocks.{b}.attention.relative_position_bias.relative_position_bias_table"
                for s in (0, 1)
                for b in (0, 1)
            },
        ),
    ],
)
def test_weight_decay_spares_what_the_reference_spares(kind, exempt):
    model = small_model(kind)
    spared = {id(p) for group in parameter_groups(model, 0.05) if not group["weight_decay"] for p in group["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in spared and p.ndim > 1}
    assert named == {f"backbone.{name}" for name in exempt}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_ratio": 1.0}, ["1.0", "[0, 1)"]),
        ({"backbone_config": ViTConfig()}, ["vit", "beit, swin"]),
        ({"backbone_config": small_beit(image_size=72, patch_size=8), "mask_patch_size": 16}, ["72 x 72", "16 x 16"]),
        ({"backbone_config": small_beit(), "mask_patch_size": 24}, ["24", "16"]),
        ({"backbone_config": small_swin(image_size=96), "mask_patch_size": 12}, ["12", "8"]),
        ({"backbone_config": small_beit(image_size=32)}, ["all of the 1 x 1 squares", "mask_patch_size"]),
        ({"backbone_config": small_swin(window_size=16)}, ["8 x 8", "window_size=16", "128"]),
        ({"backbone_config": small_beit(use_mean_pooling=True)}, ["use_mean_pooling=False"]),
        ({"backbone_config": BeitConfig(use_mean_pooling=False)}, ["no positions"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        SimMIMConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("unit", [4, 8, 16])
def test_squares_may_divide_a_cell_or_be_made_of_cells(unit):
    """The paper's table 1 varies the square from 4 to 64 pixels at Swin's stride of 32."""
    assert SimMIMConfig(backbone_config=small_swin(), mask_patch_size=unit).mask_arguments() == {"unit": unit // 4}


@pytest.mark.parametrize(
    ("kind", "pixels", "mask", "words"),
    [
        ("beit", (2, 1, 64, 64), None, ["1 channels", "num_channels=1"]),
        ("beit", (2, 3, 64, 72), None, ["64 x 72", "16 x 16"]),
        ("swin", (2, 3, 64, 68), None, ["64 x 68", "8 x 8"]),
        ("swin", (2, 3, 64, 24), None, ["8 x 3", "window_size=4"]),
        ("swin", (2, 3, 64, 64), torch.zeros(2, 64, dtype=torch.bool), ["(2, 64)", "(2, 256)"]),
        ("beit", (2, 3, 64, 64), torch.zeros(2, 16), ["float32", "bool"]),
    ],
)
def test_inputs_that_do_not_fit_say_so(kind, pixels, mask, words):
    with pytest.raises(ValueError) as error:
        small_model(kind)(torch.randn(pixels), bool_masked_pos=mask)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_swin_takes_rectangles_channels_and_other_sizes(kind):
    if kind == "swin":
        backbone_config = small_swin(image_size=[64, 32], num_channels=4)
    else:
        backbone_config = Swinv2Config(**small_swin(image_size=[64, 32], num_channels=4).to_dict())
    model = SimMIMForPreTraining(SimMIMConfig(backbone_config=backbone_config)).eval()
    for size in ((64, 32), (96, 64)):
        output = model(torch.randn(2, 4, *size))
        output.loss.backward()
        assert output.reconstruction.shape == (2, 4, *size)
        assert {panel.shape for panel in model.pictures(torch.randn(1, 4, *size)).values()} == {(1, 4, *size)}


def test_pictures_show_predictions_under_the_mask_only():
    model = small_model("beit").eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output, panels = model(pixel_values), model.pictures(pixel_values)
    hidden = pixel_mask(model, output.mask).expand(-1, 3, -1, -1)
    assert list(panels) == ["picture", "masked", "reconstruction"]
    assert panels["masked"][hidden].abs().max() == 0 and torch.equal(panels["masked"][~hidden], pixel_values[~hidden])
    assert torch.equal(panels["reconstruction"][hidden], output.reconstruction[hidden])
    assert torch.equal(panels["reconstruction"][~hidden], pixel_values[~hidden])


def test_noise_draws_the_mask():
    model = small_model("beit")
    noise = torch.rand(2, 4)
    expected = make_mask("coarse", given_draw(noise), (4, 4), 0.6, unit=2)
    assert torch.equal(model(torch.randn(2, 3, 64, 64), noise=noise).mask, expected)


@pytest.mark.parametrize("kind", BACKBONES)
def test_export_has_no_mask_token_and_loads_without_a_word(kind, tmp_path):
    model = small_model(kind).eval()
    export_encoder(model, MaskedImageProcessor(**model.config.processor_settings()), tmp_path)
    plain, report = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert type(plain) in (BeitModel, SwinModel)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.embeddings.mask_token is None
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = model.backbone(pixel_values).last_hidden_state
    torch.testing.assert_close(plain.eval()(pixel_values).last_hidden_state, expected)
    assert model.backbone.embeddings.mask_token is not None, "the model in memory stays as it was"


@pytest.mark.parametrize("kind", BACKBONES)
def test_encoder_without_a_mask_token_gets_a_new_one(kind, tmp_path):
    plain = AutoModel.from_config(BACKBONES[kind]())
    assert plain.embeddings.mask_token is None
    plain.save_pretrained(tmp_path)
    for source in (plain, str(tmp_path)):
        model = SimMIMForPreTraining.from_backbone(source, mask_ratio=0.5)
        token = model.backbone.embeddings.mask_token
        assert model.config.mask_ratio == 0.5 and 0.005 < token.std() < 0.03
        for name, value in plain.state_dict().items():
            if not name.startswith("pooler."):
                assert torch.equal(model.backbone.state_dict()[name], value), name


def test_starts_from_a_beit_that_pools_the_mean():
    """As transformers' BEiT checkpoints do, which keep the norm after the last block elsewhere."""
    theirs = BeitForMaskedImageModeling(small_beit(use_mean_pooling=True, use_mask_token=True))
    model = SimMIMForPreTraining.from_backbone(theirs.beit)
    assert (model.backbone.layernorm.weight == 1).all() and theirs.config.use_mean_pooling
    for name, value in theirs.beit.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name


@pytest.mark.parametrize("kind", BACKBONES)
def test_weights_and_tables_come_back_through_the_auto_class(kind, tmp_path):
    model = small_model(kind).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedImageModeling.from_pretrained(tmp_path)
    assert type(loaded) is SimMIMForPreTraining
    pixel_values = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(pixel_values).reconstruction, model(pixel_values).reconstruction)


def test_swin_resumes_to_the_same_weights(tmp_path):
    def trainer(output: str) -> PreTrainer:
        model = small_model("swin")
        processor = MaskedImageProcessor(**model.config.processor_settings())
        pictures = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        args = PreTrainingArguments(
            output_dir=str(tmp_path / output), use_cpu=True, per_device_train_batch_size=4, max_steps=4, save_steps=2,
            learning_rate=1e-3, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        dataset = ResidentImageDataset(ArraySource("random pictures", pictures.numpy()), processor)
        return PreTrainer(model=model, args=args, processing_class=processor, train_dataset=dataset)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["half", "checkpointing", "compile"])
def test_swin_in_the_ways_the_conformance_suite_tries_vits(mode):
    model, reference = small_model("swin").train(), small_model("swin").train()
    pixel_values = torch.randn(2, 3, 64, 64)
    noise = torch.rand(2, 64)
    expected = reference(pixel_values, noise=noise)
    expected.loss.backward()
    if mode == "half":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(pixel_values, noise=noise).loss
        torch.testing.assert_close(loss, expected.loss, rtol=0.05, atol=0)
        return
    if mode == "checkpointing":
        model.gradient_checkpointing_enable()
        run = model
    else:
        run = torch.compile(model, backend="eager", fullgraph=True)
    run(pixel_values, noise=noise).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
