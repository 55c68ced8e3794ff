"""HPM against its reference, and every check of its spec (section 11)."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import ViTConfig

from hf_masked import HPMConfig, HPMForImageClassification, HPMForPreTraining, MAEForPreTraining
from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.hpm import (
    convert_official_weights,
    hard_patch_mask,
    official_config,
    relative_order_loss,
    rising_momentum,
    tiny_config,
)
from hf_masked.modeling.parts.patches import take, visible_indices
from tests.parity.fill import filled, filled_noise, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "hpm.json").read_text())["pretraining"]


def config_of(run: str) -> HPMConfig:
    """Our config for the arguments of the reference's constructor."""
    stored = PARITY[run]
    reference = stored["config"]
    return HPMConfig(
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
        norm_pix_loss=reference["norm_pix_loss"],
        decoder_hidden_size=reference["decoder_embed_dim"],
        decoder_num_hidden_layers=reference["decoder_depth"],
        decoder_num_attention_heads=reference["decoder_num_heads"],
        decoder_intermediate_size=reference["decoder_embed_dim"] * reference["mlp_ratio"],
        predictor_num_hidden_layers=reference["decoder_depth"],
        loss_prediction=run,
    )


def filled_model(run: str) -> HPMForPreTraining:
    """Filled by the reference's names and converted; only the fixed tables, which are ours to make, may be missing."""
    model = HPMForPreTraining(config_of(run)).eval()
    shapes = PARITY[run]["parameters"]
    report = model.load_state_dict(convert_official_weights(filled(shapes), model.config), strict=False)
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


@pytest.mark.parametrize("run", PARITY)
def test_losses_and_outputs_are_the_references(run):
    stored, model = PARITY[run], filled_model(run)
    pixel_values, noise = inputs_of(run)
    output = model(pixel_values, noise=noise)
    assert output.mask.int().tolist() == stored["mask"]
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    assert output.losses["reconstruction"].item() == pytest.approx(stored["reconstruction"], rel=1e-5)
    assert output.losses["prediction"].item() == pytest.approx(stored["prediction"][run], rel=1e-5)
    # The reference keeps visible tokens first, then masked ones; ours are in raster order.
    visible, masked = visible_indices(output.mask), visible_indices(~output.mask)
    order = torch.cat([visible, masked], dim=1)
    close(take(output.logits, order), stored["pred"])
    close(output.loss_map.gather(1, order), stored["loss_pred"])
    close(model.loss_per_unit(pixel_values, output.logits).gather(1, masked), stored["loss_matrix"])


@pytest.mark.parametrize("run", PARITY)
def test_gradients_are_the_references(run):
    stored, model = PARITY[run], filled_model(run)
    pixel_values, noise = inputs_of(run)
    model(pixel_values, noise=noise).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    seen = set()
    for name, norm in stored["gradient_norms"].items():
        # The conversion maps names; given names as values it tells which of ours make up one of the reference's.
        ours = convert_official_weights({name: torch.zeros(stored["parameters"][name])}, model.config).keys()
        ours = {converted for converted in ours if not converted.startswith("twin.")}
        if not ours <= gradients.keys():
            # Frozen here: the reference's gradient is rounding.
            assert norm < 1e-8 and run == "relative", name
            continue
        seen |= ours
        assert torch.stack([gradients[n].norm() for n in ours]).norm().item() == pytest.approx(norm, rel=1e-4), name
    assert seen == gradients.keys()


@pytest.mark.parametrize("run", PARITY)
def test_chosen_masks_are_the_references(run):
    stored, model = PARITY[run], filled_model(run)
    pixel_values, noise = inputs_of(run)
    close(model.predict_difficulty(pixel_values).flatten(1), stored["difficulty"])
    for epoch, mask in stored["masks"].items():
        model.training_progress = (int(epoch) + 1) / 200
        with torch.no_grad():
            assert model(pixel_values, noise=noise).mask.int().tolist() == mask, epoch
    first, *_, last = stored["masks"].values()
    assert first != last


def test_parameter_count_of_the_base_model():
    with torch.device("meta"):
        model = HPMForPreTraining(HPMConfig())
    assert sum(p.numel() for p in model.loss_predictor.parameters()) == 25_614_080
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("twin."))
    assert own + model.decoder.position_embeddings.numel() == 137_521_920


def test_official_checkpoints_convert(tmp_path):
    from hf_masked.modeling.conversion import convert
    from hf_masked.modeling.registry import get_variant

    model, shapes = filled_model("relative"), PARITY["relative"]["parameters"]
    tables = {"pos_embed": model.backbone.embeddings.position_embeddings}
    tables["decoder_pos_embed"] = model.decoder.position_embeddings
    weights = {f"module.{name}": value.detach() for name, value in (filled(shapes) | tables).items()}
    torch.save({"epoch": 800, "state_dict": weights}, tmp_path / "hpm.pth")
    config = config_of("relative")
    loaded = convert(get_variant("hpm"), tmp_path / "hpm.pth", config).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_official_config_is_read_from_the_shapes():
    shapes = {
        "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.0.mlp.fc1.weight": (3072, 768),
        "blocks.11.mlp.fc1.weight": (3072, 768),
        "decoder_embed.weight": (512, 768),
        "decoder_blocks.7.mlp.fc1.weight": (2048, 512),
        "decoder_blocks.0.mlp.fc1.weight": (2048, 512),
        **{f"decoder_blocks_losspred.{i}.mlp.fc1.weight": (2048, 512) for i in range(8)},
    }
    config = official_config({f"module.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert config.to_diff_dict() == HPMConfig().to_diff_dict()


def test_counts_of_masked_and_of_hard_patches():
    """147 of 196 are masked at any time, of them the 0, 36 and 73 with the largest predicted losses."""
    torch.manual_seed(0)
    backbone_config = tiny_config().backbone_config
    backbone_config.image_size, backbone_config.patch_size = 56, 4
    model = HPMForPreTraining(HPMConfig(**tiny_config().to_dict() | {"backbone_config": backbone_config})).eval()
    pixel_values = torch.randn(8, 3, 56, 56)
    ranks = model.predict_difficulty(pixel_values).flatten(1).argsort(dim=1, descending=True)
    for progress, hard in ((0.0, 0), (0.01, 0), (0.5, 36), (1.0, 73)):
        model.training_progress = progress
        masks = [model.draw_mask(pixel_values, (14, 14), noise=torch.rand(8, 196)) for _ in range(20)]
        assert all((mask.sum(dim=1) == 147).all() for mask in masks)
        always = torch.stack(masks).all(dim=0)  # (batch, units)
        assert always.gather(1, ranks[:, :hard]).all()
        # The next patch is one of the random ones: in 20 draws it stays visible at times.
        assert not always.gather(1, ranks[:, hard : hard + 1]).all()


def test_random_part_is_uniform_over_what_is_not_hard():
    loss_map = torch.arange(16.0).expand(20_000, -1)
    mask = hard_patch_mask(loss_map, torch.rand(20_000, 16), (4, 4), 0.75, num_hard=4)
    shares = mask.float().mean(dim=0)
    assert (shares[-4:] == 1).all() and (mask.sum(dim=1) == 12).all()
    torch.testing.assert_close(shares[:-4], torch.full((12,), 8 / 12), rtol=0, atol=0.02)
    uniform = hard_patch_mask(loss_map, torch.rand(20_000, 16), (4, 4), 0.75, num_hard=0).float().mean(dim=0)
    torch.testing.assert_close(uniform, torch.full((16,), 0.75), rtol=0, atol=0.02)


def test_without_loss_prediction_it_is_mae():
    torch.manual_seed(0)
    settings = tiny_config().to_dict() | {"loss_prediction": "none", "norm_pix_loss": True}
    model = HPMForPreTraining(HPMConfig(**settings)).eval()
    twin = MAEForPreTraining(mae.tiny_config()).eval()
    twin.load_state_dict(model.state_dict())
    model.training_progress = 1.0
    pixel_values, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    ours, theirs = model(pixel_values, noise=noise), twin(pixel_values, noise=noise)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.mask, theirs.mask)


def test_masks_that_are_given_are_used():
    torch.manual_seed(0)
    model = HPMForPreTraining(tiny_config()).eval()
    model.training_progress = 1.0
    mask = torch.arange(16).expand(2, -1) % 4 > 0
    output = model(torch.randn(2, 3, 32, 32), bool_masked_pos=mask)
    assert torch.equal(output.mask, mask) and output.loss.isfinite()


def test_relative_loss_knows_its_limits():
    losses = torch.rand(4, 20).sort(dim=1).values
    assert relative_order_loss(100 * torch.arange(20.0).expand(4, -1), losses).abs() < 1e-5
    assert relative_order_loss(torch.zeros(4, 20), losses).item() == pytest.approx(math.log(2), abs=1e-5)
    assert relative_order_loss(-100 * torch.arange(20.0).expand(4, -1), losses) > 10
    predicted = torch.randn(4, 20)
    expected = relative_order_loss(predicted, losses)
    torch.testing.assert_close(relative_order_loss(predicted + 5, losses), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(relative_order_loss(predicted, losses.log()), expected)
    # Equal losses make no pair.
    assert relative_order_loss(predicted, torch.ones(4, 20)) == 0
    ties = torch.tensor([[0.0, 0.0, 1.0]])
    one = relative_order_loss(torch.tensor([[0.0, 3.0, 1.0]]), ties)
    terms = [math.log(1 / (1 + math.exp(-difference)) + 1e-6) for difference in (1.0, -2.0)]
    assert one.item() == pytest.approx(-sum(terms) / 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_prediction_objective_reaches_the_encoder_and_not_its_target_or_the_twin(kind):
    torch.manual_seed(0)
    config = tiny_config()
    config.loss_prediction = kind
    model = HPMForPreTraining(config).train()
    model.training_progress = 1.0
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}

    def gradients(weight):
        model.zero_grad()
        model.config.prediction_weight = weight
        model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with_it, without = gradients(1.0), gradients(0.0)
    changed = {name for name in with_it if not torch.equal(with_it[name], without[name])}
    assert not any(name.startswith("twin.") for name in with_it)
    # The target is detached: what only the reconstruction's predictions go through does not change.
    assert not any(name.startswith(("decoder.layers", "decoder.norm", "decoder.head")) for name in changed)
    for part in ("backbone.layers.0", "backbone.embeddings", "decoder.embedding", "decoder.mask_token"):
        assert any(name.startswith(part) for name in changed), part
    assert any(name.startswith("loss_predictor") for name in changed)


def test_twin_is_the_average_exactly_and_its_momentum_the_papers():
    torch.manual_seed(0)
    model = HPMForPreTraining(tiny_config()).train()
    old = {name: p.detach().clone() for name, p in model.twin.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.update_twins()
    online = dict(model.named_parameters())
    assert {name.split(".")[0] for name in old} == {"backbone", "decoder", "loss_predictor"}
    for name, value in model.twin.named_parameters():
        torch.testing.assert_close(value, 0.999 * old[name] + 0.001 * online[name], rtol=0, atol=1e-6)
    momentum = HPMForPreTraining(HPMConfig(**tiny_config().to_dict())).twin.momentum_at
    epochs = {0: 0.999, 50: 0.99945, 100: 0.9999, 400: 0.9999, 800: 0.9999}
    for epoch, expected in epochs.items():
        assert momentum(epoch / 800) == pytest.approx(expected, abs=1e-9), epoch
    assert rising_momentum(0.5, 0.9, 0.0, 0.0) == 0.9
    assert not model.twin.training


def test_masks_come_from_the_twin_and_the_whole_picture():
    torch.manual_seed(0)
    model = HPMForPreTraining(tiny_config()).train()
    model.training_progress = 1.0
    pixel_values, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    mask = model.draw_mask(pixel_values, (4, 4), noise)
    with torch.no_grad():
        model.loss_predictor.head.weight.neg_()
    assert torch.equal(model.draw_mask(pixel_values, (4, 4), noise), mask)
    with torch.no_grad():
        model.twin.loss_predictor.head.weight.neg_()
    assert not torch.equal(model.draw_mask(pixel_values, (4, 4), noise), mask)
    before = model.predict_difficulty(pixel_values)
    assert before.shape == (4, 4, 4)
    pixel_values[:, :, :8, :8] += 5
    # Every patch is seen, and every prediction hears of it.
    assert (model.predict_difficulty(pixel_values) != before).all()


def test_order_of_the_tokens_does_not_matter():
    torch.manual_seed(0)
    model = HPMForPreTraining(tiny_config()).eval()
    sequence, order = torch.randn(2, 17, 16), torch.randperm(16)
    shuffled = torch.cat([sequence[:, :1], sequence[:, 1:][:, order]], dim=1)
    for head in (model.decoder.predict, model.loss_predictor):
        torch.testing.assert_close(head(shuffled), head(sequence)[:, order], rtol=1e-5, atol=1e-6)


def test_hidden_states_are_the_encoders_also_when_the_twin_runs():
    model = HPMForPreTraining(tiny_config()).eval()
    model.training_progress = 1.0
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values, output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 5, 32)] * 3


def test_progress_does_not_recompile_at_each_step():
    model, counter = HPMForPreTraining(tiny_config()).train(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        model.training_progress = step / 12
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}
        mask = model(**inputs).mask
        assert torch.equal(compiled(**inputs).mask, mask)
    # Without hard patches, with them, and for numbers that change.
    assert counter.frame_count <= 3
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_prediction": "exact"}, ["exact", "relative"]),
        ({"mask_kind": "block"}, ["block", "processor"]),
        ({"mask_ratio": 0.0}, ["0.0", "at least one"]),
        ({"hard_ratio_end": 1.5}, ["hard_ratio_end", "1.5"]),
        ({"momentum_warmup": -1.0}, ["momentum_warmup", "-1.0"]),
    ],
)
def test_configs_that_do_not_fit_say_so(settings, words):
    with pytest.raises(ValueError) as error:
        HPMConfig(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_rectangles_pictures_and_the_classifier(tmp_path):
    backbone_config = tiny_config().backbone_config
    backbone_config.image_size, backbone_config.num_channels = (16, 40), 4
    settings = tiny_config().to_dict() | {"backbone_config": backbone_config}
    model = HPMForPreTraining(HPMConfig(**settings)).eval()
    model.training_progress = 1.0
    pixel_values = torch.randn(2, 4, 24, 32)
    assert model(pixel_values).loss.isfinite()
    panels = model.pictures(pixel_values)
    assert {panel.shape for panel in panels.values()} == {pixel_values.shape}
    assert panels["predicted loss"].unique().numel() == 12
    model.save_pretrained(tmp_path)
    classifier = HPMForImageClassification.from_pretrained(tmp_path, num_labels=3)
    classifier(pixel_values, labels=torch.tensor([0, 2])).loss.backward()


def objects_on_black(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures with a patch-aligned square of noisy stripes, and bool (count, 16): where it is."""
    where = torch.zeros(count, 4, 4, dtype=torch.bool)
    for picture, (row, column) in zip(where, torch.randint(0, 3, (count, 2)).tolist(), strict=True):
        picture[row : row + 2, column : column + 2] = True
    stripes = (torch.arange(32) / 2 + 6 * torch.rand(count, 1, 1, 1)).sin() + 0.5 * torch.randn(count, 3, 32, 32)
    inside = where.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    return torch.where(inside, stripes, torch.tensor(-1.0)), where.flatten(1)


def test_predictor_learns_where_reconstruction_is_hard_and_masks_follow():
    torch.manual_seed(0)
    settings = tiny_config().to_dict() | {"momentum_start": 0.9, "momentum_end": 0.95}
    settings |= {"decoder_hidden_size": 32, "decoder_intermediate_size": 64}
    model = HPMForPreTraining(HPMConfig(**settings)).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    pictures, where = objects_on_black(256)

    @torch.no_grad()
    def rank_correlation() -> float:
        """Spearman's, of predicted and true losses of the masked patches of new pictures."""
        model.eval()
        output = model(pictures, noise=torch.rand(256, 16))
        masked = visible_indices(~output.mask)
        losses = model.loss_per_unit(pictures, output.logits)
        ranks = [x.gather(1, masked).argsort(dim=1).argsort(dim=1).float() for x in (output.loss_map, losses)]
        first, second = (x - x.mean(dim=1, keepdim=True) for x in ranks)
        model.train()
        return ((first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1))).mean().item()

    before = rank_correlation()
    for step in range(200):
        model.training_progress = step / 200
        loss = model(objects_on_black(32)[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_twins()
    assert rank_correlation() > max(0.5, before + 0.2)
    model.eval()
    with torch.no_grad():
        hardest = model.predict_difficulty(pictures).flatten(1).topk(4, dim=1).indices
        noise = torch.rand(256, 16)
        model.training_progress = 0.0
        random = model(pictures, noise=noise).losses["reconstruction"]
        model.training_progress = 1.0
        mined = model(pictures, noise=noise).losses["reconstruction"]
    on_object = where.gather(1, hardest).float().mean()
    assert on_object > 0.7, "a quarter by chance"
    assert mined > 1.1 * random
