"""MoCo v1 and v2 against their reference, and the checks of their spec (hallucinator.md, section 11)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BeitConfig, ConvNextConfig, Dinov2Config, ResNetConfig, SwinConfig, ViTConfig

from hf_masked import MoCoConfig, MoCoForPreTraining, MoCoModel, get_variant
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.projected_views import project
from hf_masked.modeling.siamese.moco import convert_official_weights, official_config
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "moco.json").read_text())
RUNS = PARITY["pretraining"]

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
RESNET = ResNetConfig(embedding_size=8, layer_type="basic", image_size=32, **STAGES)
BACKBONES = {
    "resnet": RESNET,
    "convnext": ConvNextConfig(num_stages=2, **STAGES),
    "vit": ViTConfig(**VIT),
    "beit": BeitConfig(**VIT, use_mask_token=True, use_relative_position_bias=True),
    "dinov2": Dinov2Config(**VIT, mlp_ratio=2),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=32, patch_size=4),
}


def small_model(seed: int = 0, **settings) -> MoCoForPreTraining:
    torch.manual_seed(seed)
    defaults = {"backbone_config": copy.deepcopy(RESNET), "projection_dim": 16, "queue_size": 24, "momentum": 0.9}
    return MoCoForPreTraining(MoCoConfig(**defaults | settings))


def views(batch: int = 8, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- the reference ---


def official_weights(stored: dict) -> dict:
    """As the reference begins: the key encoder as the query encoder, the queue of unit columns."""
    weights = filled(stored["parameters"])
    weights |= {name.replace("encoder_q", "encoder_k"): tensor for name, tensor in weights.items()}
    return weights


def model_of(run: str, dtype: torch.dtype) -> MoCoForPreTraining:
    stored = RUNS[run]
    reference, weights = stored["config"], official_weights(stored)
    queue = filled_pixels((reference["dim"], reference["K"]), f"{run}.queue").to(dtype)
    weights |= {"queue": F.normalize(queue, dim=0), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    config = official_config(weights)
    config.momentum = reference["m"]
    assert (config.temperature, config.projection_layers) == (reference["T"], 1 + reference["mlp"])
    model = MoCoForPreTraining(config)
    report = model.load_state_dict(convert_official_weights(weights, config), strict=False)
    assert not report.unexpected_keys and all("running_" in n or "num_batches" in n for n in report.missing_keys)
    # Made in double precision before and after: single precision would round the queue.
    model = model.to(dtype).train()
    model.queue.vectors.copy_(F.normalize(queue, dim=0).T)
    return model


def pixels(run: str, step: int) -> torch.Tensor:
    reference = RUNS[run]["config"]
    size = reference["image_size"]
    return filled_pixels((reference["batch"], 2, 3, size, size), f"{run}.pixels.{step}")


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored, dtype=ours.dtype)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", RUNS)
def test_steps_are_the_references(run):
    """Four steps of SGD: losses, logits and the sequence of the keys, so the twin moves when the reference's does.

    The reference moves its key encoder at the start of the forward pass, we after the step of the optimizer.
    """
    stored, model = RUNS[run], model_of(run, torch.float64)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], stored["config"]["lr"], momentum=0.9, weight_decay=1e-4
    )
    renamed = {name: next(iter(convert_official_weights({name: None}, model.config))) for name in stored["parameters"]}
    for number, step in enumerate(stored["steps"]):
        output = model(pixels(run, number).double())
        assert output.loss.item() == pytest.approx(step["loss"], rel=1e-5)
        close(output.logits, step["logits"])
        close(output.key, step["keys"])
        optimizer.zero_grad()
        output.loss.backward()
        if number == 0:
            ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert set(renamed.values()) == ours.keys(), "the key encoder gets no gradient"
            for name, norm in step["gradient_norms"].items():
                assert ours[renamed[name]].norm().item() == pytest.approx(norm, rel=1e-5), name
        optimizer.step()
        model.update_twins()
    assert model.queue.pointer == stored["pointer"]
    buffers = convert_official_weights({n: torch.tensor(v) for n, v in stored["buffers"].items()}, model.config)
    assert any(name.startswith("twin.") for name in buffers), "the key encoder has running statistics of its own"
    for name, value in buffers.items():
        close(model.state_dict()[name], value.tolist())


@pytest.mark.parametrize("run", RUNS)
def test_loss_in_single_precision_is_the_references(run):
    output = model_of(run, torch.float32)(pixels(run, 0))
    assert output.loss.item() == pytest.approx(RUNS[run]["steps"][0]["loss"], abs=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_official_checkpoint_converts_strictly(run, tmp_path):
    stored = RUNS[run]
    reference = stored["config"]
    official = official_weights(stored)
    norms = {name.rsplit(".", 1)[0] for name, shape in stored["parameters"].items() if len(shape) == 1}
    for norm in norms - {"encoder_q.fc", "encoder_q.fc.0", "encoder_q.fc.2"}:
        width = len(official[f"{norm}.bias"])
        for encoder in (norm, norm.replace("encoder_q", "encoder_k")):
            official |= {f"{encoder}.running_mean": torch.zeros(width), f"{encoder}.running_var": torch.ones(width)}
            official[f"{encoder}.num_batches_tracked"] = torch.tensor(7)
    official["encoder_k.conv1.weight"] = official["encoder_k.conv1.weight"] + 1
    official["queue"] = F.normalize(torch.randn(reference["dim"], reference["K"]), dim=0)
    official["queue_ptr"] = torch.tensor([reference["batch"]])
    official = {f"module.{name}": tensor for name, tensor in official.items()}
    path = tmp_path / "moco_pretrain.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": official, "optimizer": {}}, path)
    model = convert(get_variant("moco"), path)
    assert isinstance(model, MoCoForPreTraining) and model.config.backbone_config.depths == reference["depths"]
    assert torch.equal(model.queue.vectors, official["module.queue"].T) and model.queue.pointer == reference["batch"]
    stem = "embedder.embedder.convolution.weight"
    assert torch.equal(model.backbone.state_dict()[stem], official["module.encoder_q.conv1.weight"])
    assert torch.equal(model.twin.backbone.state_dict()[stem], official["module.encoder_k.conv1.weight"])
    torch.save({"state_dict": official | {"module.predictor.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"left over: predictor\.weight"):
        convert(get_variant("moco"), path)


# --- section 11, and section 8 ---


def test_key_encoder_and_queue_get_no_gradient():
    model = small_model().train()
    output = model(views())
    output.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.twin.parameters())
    assert not model.queue.vectors.requires_grad and not output.key.requires_grad
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.abs().max() > 0 for p in trained.values())


def test_keys_enter_the_queue_after_the_logits_in_order():
    """Queue: FIFO; after ceil(K / B) steps all rows are new; the positive is not among the step's negatives."""
    model = small_model().train()
    begin, entered = model.queue().clone(), []
    for step in range(3):
        before = model.queue()
        output = model(views(seed=step))
        torch.testing.assert_close(output.logits[:, 1:], output.query @ before.T / 0.2)
        torch.testing.assert_close(output.logits[:, 0], (output.query * output.key).sum(dim=1) / 0.2)
        entered.append(output.key)
    assert torch.equal(model.queue(), torch.cat(entered)) and model.queue.pointer == 0
    assert not (model.queue() == begin).all(dim=1).any()
    model(views(seed=3))
    assert torch.equal(model.queue()[8:], torch.cat(entered[1:])) and model.queue.pointer == 8


def test_evaluation_leaves_queue_and_statistics_alone():
    model = small_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(views(5))  # and takes batches that do not divide the queue
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_that_does_not_divide_the_queue_is_named():
    with pytest.raises(ValueError, match=r"queue_size is 24; .*here 5"):
        small_model().train()(views(5))


def test_twin_has_batch_statistics_of_its_own_and_averages_parameters_only():
    model = small_model().train()
    start = {name: value.clone() for name, value in model.twin.state_dict().items()}
    model(views())
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(1.0)
    model.update_twins()
    for name, value in model.twin.projector.named_parameters():
        torch.testing.assert_close(value, start[f"projector.{name}"] + 0.1)
    statistics = "embedder.embedder.normalization.running_mean"
    mine, online = (each.state_dict()[statistics] for each in (model.twin.backbone, model.backbone))
    assert not torch.equal(mine, online) and not torch.equal(mine, start[f"backbone.{statistics}"])


def test_queue_and_twin_are_saved_and_go_on(tmp_path):
    model = small_model().train()
    model(views())
    with torch.no_grad():
        model.projector[0].weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = MoCoForPreTraining.from_pretrained(tmp_path).train()
    first, second = model(views(seed=1)), loaded(views(seed=1))
    assert torch.equal(first.logits, second.logits) and loaded.queue.pointer == 16
    assert not torch.equal(loaded.twin.projector[0].weight, loaded.projector[0].weight)


def test_queue_of_a_model_without_one_in_its_checkpoint_is_random_and_of_unit_length(tmp_path):
    small_model().backbone.save_pretrained(tmp_path)
    model = MoCoForPreTraining.from_backbone(str(tmp_path), projection_dim=16, queue_size=24)
    torch.testing.assert_close(model.queue.vectors.norm(dim=1), torch.ones(24))
    assert model.queue.vectors.std() > 0.1


def test_projectors_of_both_versions():
    def kinds(**settings):
        return [type(layer).__name__ for layer in small_model(**settings).projector]

    assert kinds(projection_layers=1) == ["Linear"] and kinds() == ["Linear", "ReLU", "Linear"]
    with torch.device("meta"):
        v1, v2 = (MoCoModel(MoCoConfig(projection_layers=layers)) for layers in (1, 2))
    assert sum(p.numel() for p in v1.projector.parameters()) == 2048 * 128 + 128
    assert sum(p.numel() for p in v2.projector.parameters()) == 2048 * 2048 + 2048 + 2048 * 128 + 128


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_whole_and_at_other_sizes(name):
    model = small_model(backbone_config=copy.deepcopy(BACKBONES[name])).train()
    model(views()).loss.backward()
    without = {
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)
    }
    # A bias of all keys moves every attention score of a query alike.
    assert not {n for n in without if not n.endswith(("k_proj.bias", "key.bias"))}
    assert model(views(size=48)).logits.shape == (8, 25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue_size": 0}, "queue_size is 0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(**settings)


# --- it learns ---


def smooth_views(count: int) -> torch.Tensor:
    """(count, 2, 3, 16, 16): two noisy views of smooth pictures."""
    generator = torch.Generator().manual_seed(0)
    pictures = F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), size=16, mode="bilinear").unsqueeze(1)
    return pictures + 0.5 * torch.randn(count, 2, 3, 16, 16, generator=generator)


@torch.no_grad()
def retrieval(model, data: torch.Tensor) -> float:
    """Share of the first views whose nearest second view is their own, with everything in eval mode."""
    model.eval()
    first, second = (F.normalize(project(model, view)[1], dim=1) for view in data.unbind(dim=1))
    return ((first @ second.T).argmax(dim=1) == torch.arange(len(data))).float().mean().item()


def test_learns_to_find_the_other_view():
    model, data = small_model(queue_size=256, projection_dim=32), smooth_views(320)
    untrained = retrieval(model, data[256:])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        model.train()
        loss = model(data[torch.randperm(256, generator=generator)[:32]]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_twins()
    trained = retrieval(model, data[256:])
    assert trained > untrained + 0.25, (untrained, trained)
