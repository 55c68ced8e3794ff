"""Point-MAE against its reference, and the checks of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch

from hf_masked import (
    PointCloudProcessor,
    PointMAEConfig,
    PointMAEEncoder,
    PointMAEEncoderConfig,
    PointMAEForPointCloudClassification,
    PointMAEForPreTraining,
    PointMAEModel,
)
from hf_masked.modeling.masked_points.point_mae import (
    convert_official_classifier,
    convert_official_weights,
    official_config,
    tiny_config,
)
from hf_masked.modeling.parts.points import chamfer_distance, farthest_point_sample, group_points, nearest_neighbours
from hf_masked.processing.masks.groups import num_masked_groups
from hf_masked.training.optimization import parameter_groups
from tests.parity.fill import filled, filled_noise, filled_pixels

REFERENCE = json.loads((Path(__file__).parents[2] / "parity" / "point_mae.json").read_text())
PARITY = REFERENCE["pretraining"]


def encoder_of(reference: dict) -> PointMAEEncoderConfig:
    """Our encoder's config for the arguments of the reference's constructors."""
    return PointMAEEncoderConfig(
        hidden_size=reference["trans_dim"],
        num_hidden_layers=reference["depth"],
        num_attention_heads=reference["num_heads"],
        intermediate_size=4 * reference["trans_dim"],
        drop_path_rate=0.0,
        num_groups=reference["num_group"],
        group_size=reference["group_size"],
        num_labels=reference.get("cls_dim", 2),
    )


def reference_model(run: str) -> tuple[PointMAEForPreTraining, torch.Tensor, torch.Tensor]:
    """Ours with the reference's weights, the points and the noise of the mask."""
    found = PARITY[run]
    reference = found["config"]
    model = PointMAEForPreTraining(
        PointMAEConfig(
            backbone_config=encoder_of(reference),
            num_points=reference["npoints"],
            mask_ratio=reference["mask_ratio"],
            mask_kind={"rand": "random", "block": "block"}[reference["mask_type"]],
            decoder_num_hidden_layers=reference["decoder_depth"],
            decoder_num_attention_heads=reference["decoder_num_heads"],
            loss_type=reference["loss"],
        )
    )
    weights = convert_official_weights(filled(found["parameters"]), model.config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("running" in name or "batches" in name for name in missing)
    batch, groups = reference["batch"], reference["num_group"]
    points = filled_pixels((batch, reference["npoints"], 3), f"{run}.points") / 2
    return model.train(), points, filled_noise(batch, groups, f"{run}.noise")


@pytest.mark.parametrize("run", PARITY)
def test_losses_and_predictions_are_those_of_the_reference(run):
    found = PARITY[run]
    model, points, noise = reference_model(run)
    output = model(points, noise=noise)
    assert output.mask.int().tolist() == found["mask"]
    torch.testing.assert_close(output.center, torch.tensor(found["center"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss, torch.tensor(found["loss"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.last_hidden_state, torch.tensor(found["latent"]), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(output.logits, torch.tensor(found["pred"]), rtol=1e-5, atol=2e-5)
    output.loss.backward()
    ours = dict(model.named_parameters())
    for name, norm in found["gradient_norms"].items():
        (renamed,) = convert_official_weights({name: torch.zeros(1, 1, 1)}, model.config)
        assert ours[renamed].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), name
    model.eval()
    with torch.no_grad():
        output = model(points, noise=noise)
    torch.testing.assert_close(output.loss, torch.tensor(found["evaluation"]["loss"]), rtol=1e-5, atol=0)


def test_classifier_is_that_of_the_reference():
    found = REFERENCE["finetuning"]
    model = PointMAEForPointCloudClassification(encoder_of(found["config"])).eval()
    weights = convert_official_classifier(filled(found["parameters"]))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("running" in name or "batches" in name for name in missing)
    points = filled_pixels((found["config"]["batch"], found["config"]["npoints"], 3), "finetuning.points") / 2
    with torch.no_grad():
        logits = model(points).logits
    torch.testing.assert_close(logits, torch.tensor(found["logits"]), rtol=1e-5, atol=1e-5)


def test_config_of_an_official_checkpoint():
    state = {f"module.{name}": value for name, value in filled(PARITY["random"]["parameters"]).items()}
    config = official_config(state)
    encoder = config.backbone_config
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.group_size) == (24, 2, 6)
    assert config.decoder_num_hidden_layers == 1 and not encoder.qkv_bias


def test_parameters_are_as_many_as_the_papers():
    with torch.device("meta"):
        model = PointMAEForPreTraining(PointMAEConfig())
        classifier = PointMAEForPointCloudClassification(PointMAEEncoderConfig(num_labels=40))

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model) == 29_006_432 and count(model.backbone) == 21_825_024
    assert count(classifier) == 22_099_752
    assert num_masked_groups(64, 0.6) == 38


def test_farthest_points_are_those_of_a_loop():
    points = torch.randn(2, 40, 3)
    found = farthest_point_sample(points, 12, 0.3)
    for cloud, chosen in zip(points.double(), found.tolist(), strict=True):
        expected, radii = [0], []
        for _ in range(11):
            distance = torch.cdist(cloud, cloud[expected], compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
            distance[cloud.norm(dim=1) <= 0.3] = -1
            expected.append(int(distance.argmax()))
            radii.append(distance.max())
        assert chosen == expected and radii == sorted(radii, reverse=True)


def test_patches_hold_their_centre_and_the_nearest_points():
    points = torch.randn(2, 30, 3)
    center, neighborhood = group_points(points, 5, 7)
    assert (neighborhood.norm(dim=-1).amin(dim=-1) == 0).all()
    distance = neighborhood.norm(dim=-1)
    assert (distance.diff(dim=-1) >= 0).all()
    exact = torch.cdist(center.double(), points.double()).topk(7, largest=False).indices
    assert torch.equal(exact.sort().values, nearest_neighbours(points, center, 7).sort().values)
    moved = group_points(points + 5, 5, 7)
    torch.testing.assert_close(moved[1], neighborhood, rtol=0, atol=2e-6)


def test_chamfer_distance():
    a, b = torch.randn(3, 6, 3), torch.randn(3, 5, 3)
    assert chamfer_distance(a, a[:, torch.randperm(6)]).abs().max() == 0
    torch.testing.assert_close(chamfer_distance(a, b), chamfer_distance(b, a))
    for squared in (True, False):
        for row in range(3):
            table = [[float(((p - t) ** 2).sum()) for t in b[row].double()] for p in a[row].double()]
            one, other = [min(line) for line in table], [min(line) for line in zip(*table, strict=True)]
            if not squared:
                one, other = [v**0.5 for v in one], [v**0.5 for v in other]
            expected = (sum(one) / 6 + sum(other) / 5) / (1 if squared else 2)
            assert chamfer_distance(a, b, squared)[row].item() == pytest.approx(expected, rel=1e-6)
    same = a.clone().requires_grad_()
    chamfer_distance(same, a, squared=False).sum().backward()
    assert same.grad.isfinite().all()


@pytest.fixture
def model() -> PointMAEForPreTraining:
    torch.manual_seed(0)
    return PointMAEForPreTraining(tiny_config()).eval()


def test_order_of_points_changes_nothing(model):
    points = torch.randn(2, 48, 3)
    expected = model(points)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(47)])
    torch.testing.assert_close(model(points[:, order]).loss, expected.loss, rtol=1e-5, atol=0)


def test_masked_points_leak_in_training_alone(model):
    center, neighborhood = model.backbone.group(torch.randn(2, 48, 3))
    mask = model.draw_mask(center)
    for training in (False, True):
        model.train(training)
        given = neighborhood.clone().requires_grad_()
        model(center=center, neighborhood=given, bool_masked_pos=mask).last_hidden_state.square().sum().backward()
        assert bool(given.grad[mask].abs().max() > 0) == training  # through the statistics of batch norm
        assert given.grad[~mask].abs().max() > 0


def test_block_masks_are_the_nearest_of_a_centre():
    model = PointMAEForPreTraining(PointMAEConfig(**{**tiny_config().to_diff_dict(), "mask_kind": "block"}))
    center, _ = model.backbone.group(torch.randn(4, 48, 3))
    for mask, centers in zip(model.draw_mask(center), center, strict=True):
        count = int(mask.sum())
        assert count == num_masked_groups(8, 0.6)
        nearest = torch.cdist(centers, centers).argsort(dim=1)[:, :count]
        assert any(set(row) == set(mask.nonzero().flatten().tolist()) for row in nearest[mask].tolist())


def test_encoder_alone_and_with_all_patches_agree(model, tmp_path):
    points = torch.randn(2, 48, 3)
    model.save_pretrained(tmp_path)
    features = PointMAEModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(features(points).last_hidden_state, model.backbone(points).last_hidden_state)
    model.backbone.save_pretrained(tmp_path / "encoder")
    assert isinstance(PointMAEEncoder.from_pretrained(tmp_path / "encoder"), PointMAEEncoder)
    classifier = PointMAEForPointCloudClassification.from_pretrained(tmp_path / "encoder", num_labels=5).train()
    output = classifier(points, labels=torch.tensor([0, 4]))
    output.loss.backward()
    assert output.logits.shape == (2, 5)
    torch.testing.assert_close(classifier.encoder.norm.weight, model.backbone.norm.weight)


def test_tokens_do_not_decay(model):
    spared = {id(p) for group in parameter_groups(model, 0.05) if not group["weight_decay"] for p in group["params"]}
    assert id(model.decoder.mask_token) in spared and id(model.head.weight) not in spared


def test_errors_name_what_is_wrong(model):
    with pytest.raises(ValueError, match="3 points per cloud"):
        model(torch.randn(1, 3, 3))
    with pytest.raises(ValueError, match="expected \\(batch, points, 3\\)"):
        model(torch.randn(1, 48, 6))
    with pytest.raises(ValueError, match=r"mask_ratio is 0\.0"):
        PointMAEConfig(mask_ratio=0.0)
    with pytest.raises(ValueError, match="loss_type is 'emd'"):
        PointMAEConfig(loss_type="emd")


def test_processor_draws_by_keys():
    processor = PointCloudProcessor(num_points=20, num_groups=8, rotation="z")
    clouds = [torch.randn(50, 3), torch.randn(9, 3)]
    first, again = (processor.prepare_training(clouds, torch.tensor([3, 7]), 1, 0) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, processor.prepare_training(clouds, torch.tensor([3, 7]), 1, 1))
    torch.testing.assert_close(first.mean(dim=1), torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(first.norm(dim=-1).amax(dim=1), torch.ones(2))
    inputs = processor.finish_training(first, torch.tensor([3, 7]), 1, 0)
    alone = processor.finish_training(first[1:], torch.tensor([7]), 1, 0)
    assert torch.equal(inputs["bool_masked_pos"].sum(dim=1), torch.tensor([4, 4]))
    for name, value in alone.items():
        assert torch.equal(inputs[name][1:], value)
