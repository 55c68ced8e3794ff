"""CropMAE against its reference, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig

from hf_masked import CropMAEConfig, CropMAEForPreTraining, CropMAEModel, CropPairImageProcessor
from hf_masked.evaluation.label_propagation import hard_labels, propagate_labels, segmentation_measures, soft_labels
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.parts.backbones import encode_visible, tiny_vit
from hf_masked.modeling.parts.blocks import CrossAttention
from hf_masked.modeling.registry import get_variant
from hf_masked.modeling.siamese.cropmae import convert_official_weights, official_config, tiny_config
from tests.modeling.siamese.views import views
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "cropmae.json").read_text())
RUNS = PARITY["pretraining"]


def small_model(seed: int = 0, **settings) -> CropMAEForPreTraining:
    torch.manual_seed(seed)
    config = {name: value for name, value in tiny_config().to_diff_dict().items() if name != "model_type"}
    return CropMAEForPreTraining(CropMAEConfig(**config | settings)).eval()


def same(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.as_tensor(stored)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


# --- parity ---


def reference_run(name: str) -> tuple[dict, CropMAEForPreTraining, torch.Tensor]:
    """The reference's run, our model with its weights, and the pairs."""
    stored = RUNS[name]
    reference = stored["config"]
    config = CropMAEConfig(
        backbone_config=ViTConfig(
            hidden_size=reference["embed_dim"],
            num_hidden_layers=reference["depth"],
            num_attention_heads=reference["num_heads"],
            intermediate_size=4 * reference["embed_dim"],
            layer_norm_eps=1e-6,
            image_size=reference["img_size"],
            patch_size=reference["patch_size"],
        ),
        mask_ratio=reference["mask_ratio"],
        norm_pix_loss=reference["norm_pix_loss"],
        decoder_hidden_size=reference["decoder_embed_dim"],
        decoder_num_hidden_layers=reference["decoder_depth"],
        decoder_num_attention_heads=reference["decoder_num_heads"],
    )
    model = CropMAEForPreTraining(config).eval()
    loaded = model.load_state_dict(convert_official_weights(filled(stored["parameters"]), config), strict=False)
    # The tables of positions are the reference's own there and ours here.
    tables = {"backbone.embeddings.position_embeddings", "decoder.position_embeddings"}
    assert set(loaded.missing_keys) == tables and not loaded.unexpected_keys
    size = (stored["batch"], 2, 3, reference["img_size"], reference["img_size"])
    return stored, model, filled_pixels(size, f"{name}.pixels")


@pytest.mark.parametrize("name", RUNS)
def test_loss_and_outputs_are_the_references(name):
    stored, model, pixel_values = reference_run(name)
    mask = torch.tensor(stored["mask"]).bool()
    output = model(pixel_values, noise=filled_noise(*mask.shape, f"{name}.noise"))
    assert torch.equal(output.mask, mask)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    same(output.logits, stored["pred"])
    same(output.last_hidden_state[:1], stored["other"])
    # The reference keeps its tokens in the order of the noise, ours are in raster order.
    visible, order = torch.tensor(stored["ids_keep"]).sort(dim=1)
    latent = torch.tensor(stored["latent"])
    tokens = latent[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, latent.shape[-1]))
    same(encode_visible(model.backbone, pixel_values[:, 1], visible), torch.cat([latent[:, :1], tokens], dim=1))


@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_the_references(name):
    stored, model, pixel_values = reference_run(name)
    model(pixel_values, torch.tensor(stored["mask"]).bool()).loss.backward()
    for parameter, norm in stored["gradient_norms"].items():
        probe = convert_official_weights({parameter: torch.zeros(stored["parameters"][parameter])}, model.config)
        found = torch.stack([model.get_parameter(ours).grad.norm() for ours in probe]).norm().item()
        assert found == pytest.approx(norm, rel=1e-4), parameter


def official_checkpoint(**changes) -> dict[str, torch.Tensor]:
    """Names and shapes of an official checkpoint of ViT-S, with fewer blocks and patches."""
    shapes = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 5, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "mask_token": (1, 1, 256),
        "decoder_pos_embed": (1, 5, 256),
        "decoder_embed.weight": (256, 384),
        "decoder_embed.bias": (256,),
        "decoder_pred.weight": (768, 256),
        "decoder_pred.bias": (768,),
    }
    encoder = {"attn.qkv": (1152, 384), "attn.proj": (384, 384), "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
    decoder = {"self_attn.out_proj": (256, 256), "multihead_attn.out_proj": (256, 256)}
    decoder |= {"linear1": (2048, 256), "linear2": (256, 2048)}
    linears = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in encoder.items()}
    linears |= {f"decoder_blocks.0.{name}": shape for name, shape in decoder.items()}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("self_attn", "multihead_attn"):
        shapes |= {f"decoder_blocks.0.{name}.in_proj_weight": (768, 256)}
        shapes |= {f"decoder_blocks.0.{name}.in_proj_bias": (768,)}
    norms = {"norm": 384, "decoder_norm": 256}
    norms |= {f"blocks.{i}.norm{k}": 384 for i in range(2) for k in (1, 2)}
    norms |= {f"decoder_blocks.0.norm{k}": 256 for k in (1, 2, 3)}
    shapes |= {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}
    return filled(shapes | changes)


def test_official_checkpoints_convert_whole(tmp_path):
    official = official_checkpoint()
    torch.save({"model": official, "epoch": 400}, tmp_path / "official.pt")
    model = convert(get_variant("cropmae"), tmp_path / "official.pt")
    config = model.config
    assert type(model) is CropMAEForPreTraining and config.backbone_config.image_size == 32
    assert config.backbone_config.num_attention_heads == 6 and config.decoder_num_attention_heads == 8
    assert config.decoder_intermediate_size == 2048 and config.decoder_num_hidden_layers == 1
    stack = official["decoder_blocks.0.multihead_attn.in_proj_weight"]
    attention = model.decoder.layers[0].cross_attention
    assert torch.equal(torch.cat([attention.query.weight, attention.key_value.weight]), stack)
    assert torch.equal(model.decoder.position_embeddings, official["decoder_pos_embed"])
    encoder_alone = {name: value for name, value in official.items() if not name.startswith(("decoder", "mask"))}
    torch.save({"model": encoder_alone}, tmp_path / "encoder.pt")
    assert type(convert(get_variant("cropmae"), tmp_path / "encoder.pt")) is CropMAEModel


def test_a_checkpoint_of_unknown_heads_is_refused():
    with pytest.raises(ValueError, match=r"decoder is 128 wide.*256, 512, 1024"):
        official_config(official_checkpoint(**{"decoder_embed.weight": (128, 384)}))


# --- section 11 ---


def test_visible_patches_are_two_and_nine_of_196_for_every_sample():
    for ratio, visible in ((0.985, 2), (0.95, 9)):
        model = small_model(
            backbone_config=tiny_config().backbone_config.to_dict() | {"image_size": 112}, mask_ratio=ratio
        )
        mask = model.draw_mask(torch.zeros(50, 3, 112, 112), (14, 14))
        assert ((~mask).sum(dim=1) == visible).all()


def test_visible_tokens_go_back_to_their_places():
    """What the reference's `ids_restore` is for: the sequence that the decoder is given."""
    model = small_model(mask_ratio=0.75)
    mask = model.draw_mask(torch.zeros(3, 3, 32, 32), (4, 4))
    visible = model._visible(mask, (4, 4))
    tokens = torch.randn(3, 1 + 4, 32)
    sequence = model.decoder.embed(tokens, visible, (4, 4)) - model.decoder.position_embeddings
    embedded = model.decoder.embedding(tokens)
    torch.testing.assert_close(sequence[:, 0], embedded[:, 0])
    for row in range(3):
        torch.testing.assert_close(sequence[row, 1:][~mask[row]], embedded[row, 1:])
        torch.testing.assert_close(sequence[row, 1:][mask[row]], model.decoder.mask_token[0].expand(12, -1))


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        model = CropMAEForPreTraining(CropMAEConfig())
    assert sum(p.numel() for p in model.decoder.layers.parameters()) == 6_315_008
    assert sum(p.numel() for p in model.decoder.layers[0].parameters()) == 1_578_752
    assert sum(p.numel() for p in model.backbone.layers.parameters()) == 21_293_568


def test_the_loss_reaches_view_1_and_no_masked_pixel_through_the_encoder():
    model = small_model(mask_ratio=0.75)
    pixel_values = views(3).requires_grad_()
    output = model(pixel_values)
    # Of the prediction, not of the loss, whose target the masked pixels are.
    output.logits.square().sum().backward()
    reached = pixel_values.grad.abs().unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).sum(dim=(2, 4, 6))  # (3, 2, 4, 4)
    assert (reached[:, 0] > 0).all()
    assert torch.equal(reached[:, 1].flatten(1) > 0, ~output.mask)
    first = views(3).requires_grad_()
    model(first).loss.backward()
    assert first.grad[:, 0].abs().sum() > 0


def test_no_gradient_is_stopped_on_the_way_to_either_view():
    """Each encoder pass alone moves the encoder's weights."""
    model = small_model(mask_ratio=0.75)
    weight, gradients = model.backbone.layers[0].mlp.fc1.weight, {}
    for stopped in ("view 1", "view 2"):
        model.zero_grad()
        pixel_values, mask = views(3), model.draw_mask(torch.zeros(3, 3, 32, 32), (4, 4))
        visible = model._visible(mask, (4, 4))
        other = encode_visible(model.backbone, pixel_values[:, 0])
        seen = encode_visible(model.backbone, pixel_values[:, 1], visible)
        other, seen = (other.detach(), seen) if stopped == "view 1" else (other, seen.detach())
        model.loss(pixel_values[:, 1], model.decoder(seen, visible, (4, 4), other), mask).backward()
        gradients[stopped] = weight.grad.clone()
    model.zero_grad()
    model(pixel_values, mask).loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    torch.testing.assert_close(weight.grad, sum(gradients.values()), rtol=1e-4, atol=1e-8)


def test_the_loss_does_not_see_brightness_and_contrast_of_a_target_patch():
    model, pixel_values = small_model(mask_ratio=0.75), views(2)
    output = model(pixel_values)
    masked = output.mask[0].nonzero()[0].item()
    row, column = 8 * (masked // 4), 8 * (masked % 4)
    changed = pixel_values.clone()
    changed[0, 1, :, row : row + 8, column : column + 8] *= 3.0
    changed[0, 1, :, row : row + 8, column : column + 8] += 0.7
    torch.testing.assert_close(model(changed, output.mask).loss, output.loss, rtol=1e-4, atol=0)
    plain = small_model(mask_ratio=0.75, norm_pix_loss=False)
    assert plain(changed, output.mask).loss > 1.05 * plain(pixel_values, output.mask).loss


def test_decoder_blocks_attend_across_first_and_are_normed_last():
    """The block written out: cross-attention, feed-forward, self-attention, each followed by its norm."""
    block = small_model().decoder.layers[0]
    hidden, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    expected = block.cross_attention_norm(hidden + block.cross_attention(hidden, memory))
    expected = block.feed_forward_norm(expected + block.feed_forward(expected))
    expected = block.self_attention_norm(expected + block.self_attention(expected))
    output = block(hidden, memory)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(output.mean(dim=-1), torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_attention_of_the_decoder_is_torchs():
    torch.manual_seed(0)
    config = small_model().config
    ours, theirs = CrossAttention(config, 16, 16, 2), torch.nn.MultiheadAttention(16, 2, batch_first=True)
    query, key_value = theirs.in_proj_weight.split([16, 32])
    ours.load_state_dict(
        {
            "query.weight": query,
            "query.bias": theirs.in_proj_bias[:16],
            "key_value.weight": key_value,
            "key_value.bias": theirs.in_proj_bias[16:],
            "projection.weight": theirs.out_proj.weight,
            "projection.bias": theirs.out_proj.bias,
        }
    )
    hidden, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(hidden, memory), theirs(hidden, memory, memory)[0])


def test_dropout_is_in_every_place_and_in_training_alone():
    model, pixel_values = small_model(decoder_dropout=0.5), views(2)
    mask = model(pixel_values).mask
    assert torch.equal(model(pixel_values, mask).loss, model(pixel_values, mask).loss)
    block = model.train().decoder.layers[0]
    hidden = torch.randn(2, 5, 16)
    for part in (block.cross_attention, block.self_attention, block.feed_forward, block):
        arguments = (hidden,) if part in (block.self_attention, block.feed_forward) else (hidden, hidden)
        assert not torch.equal(part(*arguments), part(*arguments))
    # Everything dropped: the residuals alone are left, normed.
    for module in block.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1.0
    expected = hidden
    for norm in (block.cross_attention_norm, block.feed_forward_norm, block.self_attention_norm):
        expected = norm(expected)
    torch.testing.assert_close(block(hidden, hidden), expected)


def test_view_1_gets_no_position_of_the_decoder():
    """Its tokens are a set to the decoder: their order changes nothing."""
    model = small_model(mask_ratio=0.75)
    tokens, visible = torch.randn(2, 5, 32), torch.tensor([[0, 3, 7, 9], [1, 2, 3, 4]])
    other = torch.randn(2, 17, 32)
    shuffled = other[:, torch.randperm(17)]
    expected = model.decoder(tokens, visible, (4, 4), other)
    torch.testing.assert_close(model.decoder(tokens, visible, (4, 4), shuffled), expected)
    assert not torch.allclose(model.decoder(tokens, visible.flip(1), (4, 4), other), expected)


def test_initialisation_has_the_references_bounds():
    model = CropMAEForPreTraining(
        CropMAEConfig(backbone_config=tiny_config().backbone_config, decoder_num_hidden_layers=1)
    )
    block = model.decoder.layers[0]
    stack = (6 / (4 * 256)) ** 0.5  # xavier-uniform of a (3 * 256, 256) matrix
    attention = block.cross_attention
    for weight, bound in (
        (attention.query.weight, stack),
        (attention.key_value.weight, stack),
        (block.self_attention.qkv.weight, stack),
        (attention.projection.weight, (6 / 512) ** 0.5),
        (block.feed_forward[0].weight, (6 / (256 + 2048)) ** 0.5),
    ):
        assert 0.99 * bound < weight.abs().max().item() <= bound
    assert attention.query.bias.abs().max() == 0 and block.cross_attention_norm.weight.min() == 1
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_single_pictures_and_wrong_ratios_are_named():
    with pytest.raises(ValueError, match=r"expected \(batch, 2, channels"):
        small_model()(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"decoder_dropout is 1\.0"):
        small_model(decoder_dropout=1.0)
    with pytest.raises(ValueError, match=r"paper's is 0\.985"):
        small_model(mask_ratio=1.0)


def test_encoder_alone_takes_single_pictures():
    model = small_model()
    encoder = CropMAEModel(model.config).eval()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith("backbone.")})
    pixel_values = views(2)
    output = encoder(pixel_values[:, 0])
    assert output.last_hidden_state.shape == (2, 17, 32)
    torch.testing.assert_close(model(pixel_values).last_hidden_state, output.last_hidden_state)


def test_pictures_show_both_views_the_mask_and_the_completion():
    model, pixel_values = small_model(mask_ratio=0.75), views(2)
    mask = model(pixel_values).mask
    panels = model.pictures(pixel_values, mask)
    assert list(panels) == ["view 1", "view 2", "masked", "completed (true patch statistics)"]
    view_1, view_2, masked, completed = panels.values()
    assert torch.equal(view_1, pixel_values[:, 0]) and torch.equal(view_2, pixel_values[:, 1])
    hidden = mask.unflatten(1, (4, 4)).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    assert torch.equal(masked, view_2.masked_fill(hidden, 0.0))
    assert torch.equal(completed.masked_fill(hidden, 0.0), masked) and not torch.equal(completed, view_2)


# --- section 11: what it learns ---


def smooth(count: int, seed: int) -> torch.Tensor:
    """uint8 (count, 1, 24, 24), clouds."""
    coarse = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, 24, mode="bicubic").mul(1.5).sigmoid()).byte()


def clouds_processor(config: CropMAEConfig, strategy: str) -> CropPairImageProcessor:
    settings = {"crop_scale": (0.5, 1.0), "flip_probability": 0.0, "image_mean": 0.5, "image_std": 0.25}
    return CropPairImageProcessor(**config.processor_settings() | settings | {"strategy": strategy})


def trained_on_clouds(strategy: str, steps: int) -> CropMAEForPreTraining:
    """A small CropMAE, of whose second view 2 of 16 patches are visible."""
    torch.manual_seed(0)
    config = CropMAEConfig(
        backbone_config=tiny_vit(hidden_size=64, image_size=16, patch_size=4, num_channels=1),
        mask_ratio=0.85,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        decoder_dropout=0.0,
    )
    model, processor = CropMAEForPreTraining(config).train(), clouds_processor(config, strategy)
    pictures = smooth(512, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step in range(steps):
        indices = torch.randint(len(pictures), (64,), generator=torch.Generator().manual_seed(step))
        pixels = processor.prepare_training(pictures[indices], indices, 0, step)
        model(**processor.finish_training(pixels, indices, 0, step)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def errors(model: CropMAEForPreTraining, strategy: str) -> dict[str, float]:
    """Losses on new clouds: with the view 1 that belongs to view 2, with another picture's, and with noise."""
    batch = clouds_processor(model.config, strategy)(list(smooth(64, 1)), training=True, seed=5)
    view_1, view_2 = batch["pixel_values"].unbind(dim=1)
    noise = torch.randn(view_1.shape, generator=torch.Generator().manual_seed(0))
    views_1 = {"own": view_1, "other": view_1.roll(1, dims=0), "noise": noise}
    mask = batch["bool_masked_pos"]
    return {name: model(torch.stack([view, view_2], dim=1), mask).loss.item() for name, view in views_1.items()}


@pytest.mark.slow
def test_the_same_view_twice_is_copied():
    found = errors(trained_on_clouds("same_views", 500), "same_views")
    assert found["own"] < 0.1 and min(found["other"], found["noise"]) > 1.0


@pytest.fixture(scope="module")
def completing() -> CropMAEForPreTraining:
    return trained_on_clouds("global_to_local", 1500)


@pytest.mark.slow
def test_a_crop_of_view_1_is_completed_from_view_1(completing):
    found = errors(completing, "global_to_local")
    assert found["own"] < found["other"] - 0.04 and found["own"] < found["noise"] - 0.02


@torch.no_grad()
def propagated(model: CropMAEForPreTraining) -> float:
    """Mean J of disks on new clouds that are propagated from one crop to another along the encoder's features."""
    processor, generator = clouds_processor(model.config, "random_views"), torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    row, column = torch.randint(6, 18, (64, 2, 1, 1), generator=generator).unbind(dim=1)
    disks = 255 * ((y - row) ** 2 + (x - column) ** 2 < 49)[:, None].byte()
    # The same seed makes the same crops of both.
    crops, masks = (
        processor(list(pictures), training=True, seed=7)["pixel_values"] for pictures in (smooth(64, 1), disks)
    )
    masks = (processor.denormalize(masks)[:, :, 0] > 0.5).long()
    features = model.backbone(crops.flatten(0, 1)).last_hidden_state[:, 1:].unflatten(1, (4, 4)).unflatten(0, (64, 2))
    found = []
    for pair, (first, second) in zip(features, masks, strict=True):
        if min(first.sum(), second.sum()) < 20:
            continue  # a crop that misses the disk
        labels = propagate_labels(pair, soft_labels(first, 2, (4, 4)), context=1, top_k=3, temperature=0.1)
        found.append(segmentation_measures(hard_labels(labels, (16, 16))[1:], second[None])["j"])
    return sum(found) / len(found)


@pytest.mark.slow
def test_regions_propagate_better_along_what_was_learnt(completing):
    torch.manual_seed(0)
    untrained = CropMAEForPreTraining(completing.config).eval()
    assert propagated(completing) > propagated(untrained) + 0.08
