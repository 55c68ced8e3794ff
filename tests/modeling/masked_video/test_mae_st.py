"""MAE-ST against its reference, and every check of its spec (section 11)."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    ViTConfig,
    VivitConfig,
    VivitModel,
)

from hf_masked import (
    CATALOGUE,
    MAEConfig,
    MAEForPreTraining,
    MAESTConfig,
    MAESTForPreTraining,
    MAESTForVideoClassification,
    MAESTModel,
)
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.masked_video.mae_st import TABLE, convert_official_weights, official_config, tiny_config
from hf_masked.modeling.parts.clips import fit_clip_positions, joint_positions, patchify_clip, unpatchify_clip
from hf_masked.processing.masks import make_mask
from hf_masked.randomness import torch_draw
from hf_masked.training.optimization import parameter_groups
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "mae_st.json").read_text())


def config_of(reference: dict, **settings) -> MAESTConfig:
    """Our config for the arguments of the reference's constructor."""
    width, patch_size = reference["embed_dim"], reference["patch_size"]
    backbone_config = VivitConfig(
        hidden_size=width,
        num_hidden_layers=reference["depth"],
        num_attention_heads=reference["num_heads"],
        intermediate_size=width * reference["mlp_ratio"],
        hidden_act="gelu",
        layer_norm_eps=reference["layer_norm_eps"],
        image_size=reference["img_size"],
        num_frames=reference["num_frames"],
        tubelet_size=[reference["t_patch_size"], patch_size, patch_size],
    )
    if "decoder_depth" in reference:
        settings |= {
            "mask_ratio": reference["mask_ratio"],
            "norm_pix_loss": reference["norm_pix_loss"],
            "num_target_frames": reference["pred_t_dim"],
            "decoder_hidden_size": reference["decoder_embed_dim"],
            "decoder_num_hidden_layers": reference["decoder_depth"],
            "decoder_num_attention_heads": reference["decoder_num_heads"],
            "decoder_intermediate_size": reference["decoder_embed_dim"] * reference["mlp_ratio"],
        }
    separable = reference["sep_pos_embed"]
    return MAESTConfig(backbone_config=backbone_config, separable_position_embeddings=separable, **settings)


def clips_of(run: str, reference: dict, batch: int) -> torch.Tensor:
    """The reference's (batch, channels, frames, ...) in our order."""
    shape = (batch, 3, reference["num_frames"], reference["img_size"], reference["img_size"])
    return filled_pixels(shape, f"{run}.pixels").transpose(1, 2)


def run_as_reference(run: str):
    stored = PARITY["pretraining"][run]
    model = MAESTForPreTraining(config_of(stored["config"])).eval()
    model.load_state_dict(convert_official_weights(filled(stored["parameters"]), model.config))
    clips = clips_of(run, stored["config"], stored["batch"])
    units = len(stored["mask"][0])
    return stored, model, model(clips, noise=filled_noise(stored["batch"], units, f"{run}.noise"))


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_and_outputs_are_the_references(run):
    stored, _, output = run_as_reference(run)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    assert output.mask.int().tolist() == stored["mask"]
    close(output.logits, stored["pred"])
    # The reference keeps its tokens in the order of the noise, ours are in raster order; its class token is gone.
    order = torch.tensor(stored["ids_keep"]).argsort(dim=1)
    latent = torch.tensor(stored["latent"])
    tokens = latent.gather(1, order.unsqueeze(-1).expand_as(latent))
    close(output.last_hidden_state[:, 1:], tokens.tolist())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_are_the_references(run):
    stored, model, output = run_as_reference(run)
    output.loss.backward()
    # Converted, numbers of the reference's parameters tell which of them each of our weights comes from.
    numbers = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(stored["parameters"].items())}
    origin = convert_official_weights(numbers, model.config)
    squares = torch.zeros(len(numbers))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            squares.index_add_(0, origin[name].flatten().long(), parameter.grad.flatten().square())
    found = dict(zip(numbers, squares.sqrt().tolist(), strict=True))
    # The gradient of the keys' biases is zero but for rounding, and not stored.
    assert all(name.endswith(".attn.k.bias") for name in numbers.keys() - stored["gradient_norms"].keys())
    for name, norm in stored["gradient_norms"].items():
        assert found[name] == pytest.approx(norm, rel=1e-4), name


def test_classifier_is_the_references():
    stored = PARITY["finetuning"]["separable"]
    config = config_of(stored["config"], num_labels=stored["config"]["num_classes"])
    model = MAESTForVideoClassification(config).eval()
    model.load_state_dict(convert_official_weights(filled(stored["parameters"]), config))
    close(model(clips_of("finetuning.separable", stored["config"], stored["batch"])).logits, stored["logits"])


def parameters_of(model: torch.nn.Module) -> int:
    """Without the backbone's table, which is filled from the small ones."""
    return sum(p.numel() for name, p in model.named_parameters() if name != TABLE)


VIT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def paper_config(**size) -> MAESTConfig:
    return MAESTConfig(backbone_config=VivitConfig(num_frames=16, hidden_act="gelu", **size))


@pytest.mark.parametrize(
    ("size", "encoder", "decoder"), [({}, 86_394_624, 13_504_256), (VIT_LARGE, 304_096_256, 13_635_328)]
)
def test_parameter_counts_are_the_references(size, encoder, decoder):
    with torch.device("meta"):
        model = MAESTForPreTraining(paper_config(**size))
    found = parameters_of(model.decoder)
    assert found == decoder and parameters_of(model) - found == encoder


def test_fine_tuned_vit_large_has_the_references_parameter_count():
    config = paper_config(**VIT_LARGE)
    config.num_labels = 400
    with torch.device("meta"):
        assert parameters_of(MAESTForVideoClassification(config)) == 304_506_256


def tiny(seed: int = 0, **settings) -> MAESTForPreTraining:
    """A tiny model of single clips."""
    torch.manual_seed(seed)
    return MAESTForPreTraining(MAESTConfig(**tiny_config().to_dict() | {"repeated_samples": 1} | settings)).eval()


def tiny_clips(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_156_of_1568_tubelets_are_visible_and_the_head_predicts_768_values():
    config = MAESTConfig()
    assert math.prod(config.target_size) * 3 == 768
    with torch.device("meta"):
        model = MAESTForPreTraining(config)
    assert model.decoder.head.out_features == 768
    mask = make_mask("random", torch_draw(3), (8, 14, 14), config.mask_ratio)
    assert (~mask).sum(dim=1).tolist() == [156] * 3
    assert (~make_mask("random", torch_draw(3), (8, 14, 14), 0.95)).sum(dim=1).tolist() == [78] * 3


def test_target_frames_are_those_of_both_programs():
    assert MAESTConfig().target_frames(16) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert MAESTConfig(target_frame_rule="stride").target_frames(16) == [0, 2, 4, 6, 8, 10, 12, 14]
    for length in range(2, 65, 2):
        expected = torch.linspace(0, length - 1, length // 2).long().tolist()
        assert MAESTConfig().target_frames(length) == expected


def test_positions_are_a_table_of_space_plus_a_table_of_time():
    positions = tiny().position_embeddings
    table = positions()[0, 1:].unflatten(0, (4, 4)).detach()  # (times, places, width)
    difference = (positions.temporal[0, 3] - positions.temporal[0, 1]).expand(4, -1)
    torch.testing.assert_close(table[3] - table[1], difference, rtol=0, atol=1e-7)


@pytest.mark.parametrize("change", ["none", "training", "other weights"])
def test_the_export_is_a_plain_vivit_with_the_same_features(change, tmp_path):
    model = tiny()
    with torch.no_grad():
        if change == "training":
            model.position_embeddings.temporal.add_(0.1 * torch.randn_like(model.position_embeddings.temporal))
        if change == "other weights":
            model.load_state_dict(tiny(seed=1).state_dict())
    model.save_pretrained(tmp_path / "model")
    model.backbone.save_pretrained(tmp_path / "encoder")
    plain = VivitModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    encoder = AutoModel.from_pretrained(tmp_path / "model")
    assert type(encoder) is MAESTModel
    expected = encoder(tiny_clips()).last_hidden_state
    torch.testing.assert_close(plain(tiny_clips()).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_weights_that_are_handed_over_to_be_saved_get_the_joint_table_too(tmp_path):
    """As when they were gathered from a sharded model, whose backbone was not filled."""
    model = tiny()
    with torch.no_grad():
        model.position_embeddings.spatial.add_(1.0)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    table = MAESTForPreTraining.from_pretrained(tmp_path).backbone.embeddings.position_embeddings
    assert torch.equal(table, model.position_embeddings())


def test_the_backbones_table_is_frozen_unless_it_is_the_one_that_learns(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    for found in (model, MAESTForPreTraining.from_pretrained(tmp_path)):
        assert not found.backbone.embeddings.position_embeddings.requires_grad
    joint = tiny(separable_position_embeddings=False)
    assert joint.backbone.embeddings.position_embeddings.requires_grad and not hasattr(joint, "position_embeddings")
    joint(tiny_clips()).loss.backward()
    assert joint.backbone.embeddings.position_embeddings.grad.abs().max() > 0


def test_initialisation_is_the_papers():
    model = tiny(decoder_num_hidden_layers=2)
    kernel = model.backbone.embeddings.patch_embeddings.projection
    bound = (6 / (32 + 3 * 2 * 8 * 8)) ** 0.5
    assert 0.9 * bound < kernel.weight.abs().max() <= bound
    assert 0 < kernel.bias.abs().max() <= (3 * 2 * 8 * 8) ** -0.5
    for weight, width in ((model.backbone.layers[0].attention.q_proj.weight, 32), (decoder_qkv(model), 16)):
        bound = (6 / (2 * width)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
    assert model.decoder.class_token.abs().max() == 0
    for table in (model.position_embeddings.spatial, model.backbone.embeddings.cls_token, model.decoder.mask_token):
        assert 0.01 < table.std() < 0.03


def decoder_qkv(model) -> torch.Tensor:
    return model.decoder.layers[1].attention.qkv.weight


def test_biases_of_keys_change_nothing():
    model = tiny()
    before = model(tiny_clips()).logits
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.attention.k_proj.bias.normal_()
    torch.testing.assert_close(model(tiny_clips()).logits, before, rtol=0, atol=3e-6)


def test_nothing_is_learned_from_masked_inputs_nor_from_visible_outputs():
    model, clips = tiny(num_target_frames=4, norm_pix_loss=False), tiny_clips().requires_grad_()
    output = model(clips)
    output.logits.retain_grad()
    # The target is data: its gradient is taken out of the picture by comparing with predictions alone.
    output.logits.square().sum().backward(retain_graph=True)
    touched = patchify_clip(clips.grad, (2, 8, 8)).abs().sum(dim=-1) > 0
    assert torch.equal(touched, ~output.mask)
    output.logits.grad = None
    output.loss.backward()
    assert torch.equal(output.logits.grad.abs().sum(dim=-1) > 0, output.mask)


def test_order_of_visible_tubelets_does_not_matter():
    model, visible = tiny(), torch.tensor([[1, 6, 11, 12]])
    shuffled = visible[:, [2, 0, 3, 1]]
    clips, grid = tiny_clips(1), (4, 2, 2)
    first = model.decoder(model.encode_visible(clips, visible)[:, 1:], visible, grid)
    second = model.decoder(model.encode_visible(clips, shuffled)[:, 1:], shuffled, grid)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_target_is_normalised_over_all_channels_together():
    """Which tells it from VideoMAE's, of each channel by itself."""
    model, clips = tiny(), tiny_clips()
    logits = model(clips).logits
    loss = model.loss_per_unit(clips, logits)
    torch.testing.assert_close(model.loss_per_unit(3 * clips + 2, logits), loss, rtol=1e-4, atol=1e-4)
    one_channel = clips * torch.tensor([3.0, 1.0, 1.0]).view(3, 1, 1)
    assert (model.loss_per_unit(one_channel, logits) - loss).abs().min() > 1e-3


def test_frames_without_a_target_matter_only_where_they_are_seen():
    model, clips = tiny(), tiny_clips(1)
    output = model(clips)
    assert model.config.target_frames(8) == [0, 2, 4, 7]
    changed = clips.clone()
    changed[:, 1] += unpatchify_clip(output.mask.unsqueeze(-1).float().expand(-1, -1, 384), (4, 2, 2), (2, 8, 8))[:, 1]
    assert (changed != clips).any()
    assert torch.equal(model(changed, output.mask).loss, output.loss)
    changed[:, 2] += 5 * torch.randn(3, 16, 16)
    assert not torch.equal(model(changed, output.mask).loss, output.loss)


def test_one_frame_and_tubelets_of_one_frame_are_mae():
    """With a decoder without blocks, in which class tokens differ: MAE's decoder gets the encoder's."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    shape |= {"image_size": 16, "layer_norm_eps": 1e-6}
    decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 0}
    video = VivitConfig(num_frames=1, tubelet_size=[1, 4, 4], hidden_act="gelu", **shape)
    torch.manual_seed(0)
    ours = MAESTForPreTraining(MAESTConfig(backbone_config=video, mask_ratio=0.75, **decoder)).eval()
    image = MAEConfig(backbone_config=ViTConfig(patch_size=4, **shape), fixed_positions=False, **decoder)
    theirs = MAEForPreTraining(image).eval()
    weights = ours.backbone.state_dict()
    weights["embeddings.patch_embeddings.projection.weight"].squeeze_(2)
    theirs.backbone.load_state_dict(weights)
    for part in ("embedding", "norm", "head"):
        getattr(theirs.decoder, part).load_state_dict(getattr(ours.decoder, part).state_dict())
    with torch.no_grad():
        theirs.decoder.mask_token.copy_(ours.decoder.mask_token)
        theirs.decoder.position_embeddings.copy_(ours.decoder.position_embeddings())
    pixels, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    found, expected = ours(pixels.unsqueeze(1), noise=noise), theirs(pixels, noise=noise)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)


def test_repeated_samples_are_clips_like_any_other():
    one, four = tiny(), tiny(repeated_samples=4)
    clips, noise = tiny_clips(8), torch.rand(8, 16)
    expected = one(clips, noise=noise)
    found = four(clips.unflatten(0, (2, 4)), noise=noise.unflatten(0, (2, 4)))
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.mask.flatten(0, 1), expected.mask) and found.mask.shape == (2, 4, 16)
    torch.testing.assert_close(found.logits.flatten(0, 1), expected.logits)
    again = four(clips.unflatten(0, (2, 4)), found.mask)
    torch.testing.assert_close(again.loss, expected.loss)


@pytest.mark.parametrize("kind", ["random", "tube", "frame"])
def test_a_compiled_forward_knows_how_many_tubelets_each_mask_leaves(kind, monkeypatch):
    model = tiny(mask_kind=kind, mask_ratio=0.6)
    mask = model.draw_mask(tiny_clips(), (4, 2, 2))
    expected = model._visible(mask, (4, 2, 2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(model._visible(mask, (4, 2, 2)), expected)
    assert expected.shape[1] == {"random": 6, "tube": 4, "frame": 4}[kind]


def test_rectangles_other_lengths_and_other_channels_work():
    settings = tiny_config().to_dict() | {"repeated_samples": 1}
    settings["backbone_config"] |= {"image_size": [16, 32], "num_channels": 1}
    torch.manual_seed(0)
    model = MAESTForPreTraining(MAESTConfig(**settings)).eval()
    for shape, units in (((1, 8, 1, 16, 32), 32), ((1, 12, 1, 24, 16), 36), ((1, 4, 1, 16, 32), 16)):
        output = model(torch.randn(shape))
        assert output.mask.shape == (1, units) and output.loss.isfinite()
    panels = model.pictures(torch.randn(1, 8, 1, 16, 32))
    assert {tuple(panel.shape) for panel in panels.values()} == {(1, 4, 1, 16, 32)}


def test_stretched_positions_keep_what_is_constant_along_an_axis():
    table = fit_clip_positions(tiny().position_embeddings(), (4, 2, 2), (8, 2, 2))
    assert table.shape == (1, 33, 32)
    time = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 2)
    stretched = fit_clip_positions(
        joint_positions(torch.zeros(1, 1, 2), time, torch.zeros(1, 4, 2)), (4, 2, 2), (4, 4, 6)
    )
    torch.testing.assert_close(stretched[0, 1:].unflatten(0, (4, 24))[:, :, 0], torch.arange(4.0).expand(24, 4).T)


def test_panels_show_the_clip_the_visible_part_and_the_completed_clip():
    model, clips = tiny(norm_pix_loss=False), tiny_clips()
    mask = model.draw_mask(clips, (4, 2, 2))
    panels = model.pictures(clips, mask)
    assert list(panels) == ["clip", "masked", "reconstruction"]
    assert torch.equal(panels["clip"], clips[:, [0, 2, 4, 7]])
    visible = patchify_clip(panels["clip"], (1, 8, 8))[~mask]
    for panel in ("masked", "reconstruction"):
        assert torch.equal(patchify_clip(panels[panel], (1, 8, 8))[~mask], visible)
    assert patchify_clip(panels["masked"], (1, 8, 8))[mask].abs().max() == 0


def official_checkpoint() -> dict[str, torch.Tensor]:
    """Of the reference's names, as wide as ViT-B and one layer deep."""
    shapes = PARITY["pretraining"]["separable"]["parameters"]
    wide = {24: 768, 96: 3072, 16: 512, 64: 2048}
    shapes = {
        name: [wide.get(size, size) if "pos_embed" not in name or i == 2 else size for i, size in enumerate(shape)]
        for name, shape in shapes.items()
        if not name.startswith(("blocks.1", "decoder_blocks.1"))
    }
    shapes["patch_embed.proj.weight"][1:] = [3, 2, 4, 4]
    shapes["decoder_pred.weight"][0] = shapes["decoder_pred.bias"][0] = 48
    return filled(shapes)


def test_official_checkpoints_convert(tmp_path):
    official = official_checkpoint()
    torch.save({"model_state": official, "epoch": 100}, tmp_path / "official.pyth")
    model = convert(CATALOGUE["mae_st"], tmp_path / "official.pyth")
    backbone = model.config.backbone_config
    assert (backbone.num_frames, backbone.image_size, list(backbone.tubelet_size)) == (8, 12, [2, 4, 4])
    assert backbone.num_attention_heads == 12 and model.config.num_target_frames == 4
    model.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.backbone.embeddings.position_embeddings, loaded.position_embeddings())
    encoder = {name: value for name, value in official.items() if "decoder" not in name and name != "mask_token"}
    assert official_config(encoder).backbone_config.to_dict() == backbone.to_dict()


def test_tables_and_tokens_decay_in_pretraining_only():
    def decaying(model):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, weight_decay=0.1)
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    tables = {"position_embeddings.spatial", "position_embeddings.temporal", "backbone.embeddings.cls_token"}
    assert tables <= decaying(tiny())
    assert not tables & decaying(MAESTForVideoClassification(tiny_config()))


def test_layer_decay_counts_the_positions_as_embeddings():
    model = MAESTForVideoClassification(tiny_config())
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=1.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.position_embeddings.spatial)] == 0.5**3 and rates[id(model.classifier.weight)] == 1.0


def test_classifier_starts_from_a_pretrained_checkpoint_and_learns(tmp_path):
    tiny().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, report = AutoModelForVideoClassification.from_pretrained(
        tmp_path, num_labels=2, drop_path_rate=0.1, classifier_dropout=0.1, output_loading_info=True
    )
    assert type(model) is MAESTForVideoClassification
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    clips, labels = tiny_clips(8), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        output = model.train()(clips, labels=labels)
        output.loss.backward()
        optimizer.step()
    assert (model.eval()(clips).logits.argmax(dim=1) == labels).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_kind": "block"}, "a mask of pictures"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"mask_ratio": 0.9, "mask_kind": "frame"}, "nothing is left to see of 4 x 2 x 2"),
        ({"repeated_samples": 0}, "repeated_samples is 0"),
        ({"num_target_frames": 3}, "take 4, one for each, or 8"),
        ({"target_frame_rule": "last"}, "target_frame_rule is 'last'"),
        ({"decoder_num_attention_heads": 3}, "decoder_hidden_size=16 is no multiple"),
        ({"backbone_config": VivitConfig(num_frames=5)}, "Clips of 5 frames cannot be cut"),
        ({"backbone_config": ViTConfig()}, "takes a backbone of type vivit"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MAESTConfig(**tiny_config().to_dict() | settings)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(2, 8, 1, 16, 16), "1 channels and the backbone takes 3"),
        (torch.zeros(2, 8, 3, 15, 16), "15 x 16 pixels"),
        (torch.zeros(2, 7, 3, 16, 16), "Clips of 7 frames"),
        (torch.zeros(2, 4, 8, 3, 16, 16), "repeated_samples"),
    ],
)
def test_wrong_inputs_are_named(clips, message):
    with pytest.raises(ValueError, match=message):
        tiny()(clips)
    if clips.ndim == 5:
        with pytest.raises(ValueError, match=message):
            MAESTModel(tiny_config())(clips)
