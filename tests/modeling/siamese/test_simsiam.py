"""SimSiam against its reference, and every check of its spec (section 11)."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    ConvNextConfig,
    ConvNextV2Config,
    DeiTConfig,
    Dinov2Config,
    RegNetConfig,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    ViTConfig,
)

from hf_masked import SimSiamConfig, SimSiamForPreTraining, SimSiamModel, get_variant
from hf_masked.evaluation.diagnostics import effective_rank
from hf_masked.evaluation.features import extract_features
from hf_masked.modeling.conversion import convert
from hf_masked.modeling.parts.heads import MLPHead
from hf_masked.modeling.parts.losses import normalized_std, softmax_cross_entropy
from hf_masked.modeling.siamese.simsiam import convert_official_weights, official_config, tiny_config
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "simsiam.json").read_text())

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
BACKBONES = {
    "resnet": ResNetConfig(embedding_size=8, layer_type="bottleneck", **STAGES),
    "regnet": RegNetConfig(embedding_size=8, groups_width=4, layer_type="x", **STAGES),
    "convnext": ConvNextConfig(num_stages=2, **STAGES),
    "convnextv2": ConvNextV2Config(num_stages=2, **STAGES),
    "vit": ViTConfig(**VIT),
    "deit": DeiTConfig(**VIT),
    "beit": BeitConfig(**VIT, use_mask_token=True, use_relative_position_bias=True),
    "dinov2": Dinov2Config(**VIT, mlp_ratio=2),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=32, patch_size=4),
}


def small_config(**settings) -> SimSiamConfig:
    settings = {
        "backbone_config": tiny_config().backbone_config,
        "projection_dim": 32,
        "predictor_hidden_dim": 8,
    } | settings
    return SimSiamConfig(**settings)


def small_model(seed: int = 0, **settings) -> SimSiamForPreTraining:
    torch.manual_seed(seed)
    return SimSiamForPreTraining(small_config(**settings))


def views(batch: int = 8, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- the reference ---


def run_as_reference(run: str, dtype: torch.dtype = torch.float64):
    stored = PARITY["pretraining"][run]
    weights = filled(stored["parameters"])
    reference = stored["config"]
    backbone_config = official_config(weights).backbone_config
    config = SimSiamConfig(
        backbone_config=backbone_config, projection_dim=reference["dim"], predictor_hidden_dim=reference["pred_dim"]
    )
    model = SimSiamForPreTraining(config)
    report = model.load_state_dict(convert_official_weights(weights, config), strict=False)
    assert not report.unexpected_keys and all("running_" in n or "num_batches" in n for n in report.missing_keys)
    model = model.to(dtype).train()
    size = reference["image_size"]
    pixel_values = filled_pixels((reference["batch"], 2, 3, size, size), f"{run}.pixels")
    return stored, model, pixel_values.to(dtype), model(pixel_values.to(dtype))


def close(ours: torch.Tensor, stored, relative: float = 1e-5) -> None:
    stored = torch.tensor(stored, dtype=ours.dtype)
    torch.testing.assert_close(ours, stored, rtol=relative, atol=relative * stored.abs().max().item())


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_and_outputs_are_the_references(run):
    stored, model, pixel_values, output = run_as_reference(run)
    assert output.loss.item() == pytest.approx(stored["loss"], rel=1e-5)
    for name in ("p1", "p2", "z1", "z2"):
        close(output[name], stored[name])
    buffers = convert_official_weights({n: torch.tensor(v) for n, v in stored["buffers"].items()}, model.config)
    for name, value in buffers.items():
        close(model.state_dict()[name], value.tolist())
    evaluated = model.eval()(pixel_values)
    for name, value in stored["evaluation"].items():
        close(evaluated[name], value)


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_loss_in_single_precision_is_the_references(run):
    stored, _, _, output = run_as_reference(run, torch.float32)
    assert output.loss.item() == pytest.approx(stored["loss"], abs=1e-5)


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_gradients_and_freezing_are_the_references(run):
    stored, model, _, output = run_as_reference(run)
    output.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    renamed = {name: next(iter(convert_official_weights({name: None}, model.config))) for name in stored["parameters"]}
    assert {renamed[name] for name in stored["trainable"]} == ours.keys()
    for name, norm in stored["gradient_norms"].items():
        assert ours[renamed[name]].norm().item() == pytest.approx(norm, rel=1e-5), name


def official_checkpoint(stored: dict) -> dict:
    weights = SimSiamForPreTraining(official_config(filled(stored["parameters"]))).state_dict()
    buffers = {name: tensor for name, tensor in weights.items() if "running_" in name or "num_batches" in name}
    names = _official_names_of_buffers(stored["parameters"])
    converted = convert_official_weights(dict.fromkeys(names), None)
    official = filled(stored["parameters"])
    official |= {name: buffers[ours] for name, ours in zip(names, converted, strict=True)}
    return {f"module.{name}": tensor for name, tensor in official.items()}


def _official_names_of_buffers(parameters: dict) -> list[str]:
    norms = {name.rsplit(".", 1)[0] for name, shape in parameters.items() if len(shape) == 1}
    norms -= {"encoder.fc.6", "predictor.3"}  # biases of linear layers
    norms |= {"encoder.fc.7"}  # has no parameters
    return [
        f"{norm}.{part}" for norm in sorted(norms) for part in ("running_mean", "running_var", "num_batches_tracked")
    ]


@pytest.mark.parametrize("run", PARITY["pretraining"])
def test_official_checkpoint_converts_strictly(run, tmp_path):
    stored = PARITY["pretraining"][run]
    official = official_checkpoint(stored)
    torch.save(
        {"epoch": 100, "arch": "resnet50", "state_dict": official, "optimizer": {}}, tmp_path / "official.pth.tar"
    )
    model = convert(get_variant("simsiam"), tmp_path / "official.pth.tar")
    assert isinstance(model, SimSiamForPreTraining)
    reference = stored["config"]
    assert model.config.backbone_config.depths == reference["depths"]
    assert (model.config.projection_dim, model.config.predictor_hidden_dim) == (
        reference["dim"],
        reference["pred_dim"],
    )
    assert torch.equal(model.projector[0].weight, official["module.encoder.fc.0.weight"])
    left_out = {name: tensor for name, tensor in official.items() if "layer2.0.bn1.running_var" not in name}
    torch.save({"state_dict": left_out}, tmp_path / "broken.pth.tar")
    with pytest.raises(
        ValueError, match=r"missing: backbone\.encoder\.stages\.1\.layers\.0\.layer\.0\.normalization\.running_var"
    ):
        convert(get_variant("simsiam"), tmp_path / "broken.pth.tar")


# --- section 11 ---


def test_target_gets_no_gradient_without_a_predictor():
    """dL/dz of the target branch is exactly 0, and the first term leaves the second view's encoder alone."""
    torch.manual_seed(0)
    for stop_gradient in (True, False):
        model = small_model(use_predictor=False, symmetric=False, stop_gradient=stop_gradient).train()
        pixel_values = views().requires_grad_()
        model(pixel_values).loss.backward()
        first, second = pixel_values.grad.unbind(dim=1)
        assert first.abs().max() > 0
        assert (second.abs().max() == 0) == stop_gradient


def test_target_matters_although_it_gets_no_gradient():
    model = small_model(symmetric=False).train()
    pixel_values = views().requires_grad_()
    other = pixel_values.detach().clone()
    other[:, 1] += torch.randn(other[:, 1].shape, generator=torch.Generator().manual_seed(1))
    loss = model(pixel_values).loss
    assert loss != model(other).loss
    loss.backward()
    assert pixel_values.grad[:, 1].abs().max() == 0


def test_predictor_gradient_reaches_the_encoder_through_z():
    """The same z is target and predictor's input: as the latter it does carry gradient."""
    model = small_model().train()
    model(views()).loss.backward()
    assert model.projector[0].weight.grad.abs().max() > 0 and model.predictor[0].weight.grad.abs().max() > 0


def test_loss_lies_in_its_range_and_is_minus_one_for_parallel_vectors():
    model, z = small_model(), torch.randn(8, 32)
    for p in (torch.randn(8, 32), -z, z):
        assert -1 <= model.loss(p, p, z, z)[0] <= 1
    assert model.loss(3 * z, 0.1 * z, z, z)[0].item() == pytest.approx(-1)
    assert model.loss(-z, -z, z, z)[0].item() == pytest.approx(1)


def test_loss_is_symmetric_in_the_views():
    model = small_model().eval()
    loss, swapped = model(views()).loss, model(views().flip(1)).loss
    torch.testing.assert_close(loss, swapped)
    one_sided = small_model(symmetric=False).eval()
    output = one_sided(views())
    assert list(output.losses) == ["from_first"] and output.loss != one_sided(views().flip(1)).loss
    assert output.loss == model(views()).losses["from_first"]


def test_parameter_counts_of_projector_and_predictor():
    with torch.device("meta"):
        model = SimSiamForPreTraining(SimSiamConfig())
    count = sum(p.numel() for p in model.projector.parameters())
    assert count == 3 * 2048**2 + 2 * (2 * 2048) + 2048
    model.freeze()
    assert sum(p.numel() for p in model.projector.parameters() if p.requires_grad) == count - 2048
    assert not list(model.projector[-1].parameters())
    assert sum(p.numel() for p in model.predictor.parameters()) == 2048 * 512 + 2 * 512 + 512 * 2048 + 2048


def test_std_of_normalised_vectors():
    generator = torch.Generator().manual_seed(0)
    for width in (32, 512):
        found = normalized_std(torch.randn(256, width, generator=generator)).item()
        assert found == pytest.approx(1 / math.sqrt(width), rel=0.1)
    constant = torch.randn(1, 32, generator=generator).expand(64, -1)
    assert normalized_std(constant).item() == pytest.approx(0, abs=1e-7)


def hard_views(noise: float, count: int = 256) -> torch.Tensor:
    """Smooth pictures in two views that share little: (count, 2, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear").unsqueeze(1)
    return (pictures + noise * torch.randn(count, 2, 3, 16, 16, generator=generator)) / (1 + noise)


def trained(noise: float, seed: int = 0, steps: int = 150, **settings):
    """The last step's output on hard views."""
    model = small_model(seed, **settings).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-4)
    data, generator = hard_views(noise), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        output = model(data[torch.randint(len(data), (32,), generator=generator)])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return output


@pytest.mark.parametrize("seed", [0, 1])
def test_collapses_without_stop_gradient_and_not_with_it(seed):
    """To one point, where the last batch norm has a shift of its own."""
    collapsed = trained(8.0, seed, projector_last_affine=True, stop_gradient=False)
    assert collapsed.z_std < 0.1 / math.sqrt(32) and collapsed.loss < -0.99
    healthy = trained(8.0, seed, projector_last_affine=True)
    assert healthy.z_std > 0.7 / math.sqrt(32) and healthy.loss > -0.95


def test_collapses_to_a_line_under_plain_batch_norm():
    """Without a shift the projections of a batch have the mean 0: they cannot be one point, and shrink to a line."""
    collapsed, healthy = (trained(8.0, steps=100, stop_gradient=stop_gradient) for stop_gradient in (False, True))
    assert effective_rank(collapsed.z1) < 2 and effective_rank(healthy.z1) > 3
    assert collapsed.z_std < 0.75 / math.sqrt(32) and healthy.z_std > 0.8 / math.sqrt(32)


def test_collapses_without_a_predictor():
    collapsed = trained(8.0, projector_last_affine=True, use_predictor=False)
    assert collapsed.z_std < 0.3 / math.sqrt(32) and collapsed.loss < -0.9


def test_backbone_alone_gives_the_models_features(tmp_path):
    model = small_model().eval()
    model(views())  # gives batch norm nothing to learn in eval mode
    model.train()(views())
    model.eval().save_pretrained(tmp_path / "ours")
    model.backbone.save_pretrained(tmp_path / "plain")
    picture = views()[:, 0]
    expected = SimSiamModel.from_pretrained(tmp_path / "ours").eval()(picture)
    plain = ResNetModel.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(plain(picture).pooler_output.flatten(1), expected.pooler_output)
    assert torch.equal(expected.projection, model.projector(model.backbone(picture).pooler_output.flatten(1)))
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "plain", num_labels=3)
    assert torch.equal(
        classifier.resnet.state_dict()["embedder.embedder.convolution.weight"],
        plain.state_dict()["embedder.embedder.convolution.weight"],
    )
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    features = extract_features(model, pixels, mean=0.5, std=0.5)
    torch.testing.assert_close(features, model.backbone((pixels / 255 - 0.5) / 0.5).pooler_output.flatten(1).detach())


# --- other encoders and settings ---


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_whole_and_at_other_sizes(name):
    torch.manual_seed(0)
    config = small_config(backbone_config=copy.deepcopy(BACKBONES[name]), zero_init_residual=False)
    model = SimSiamForPreTraining(config).train()
    model(views()).loss.backward()
    without = {
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)
    }
    # A bias of all keys moves every attention score of a query alike.
    assert not {n for n in without if not n.endswith("k_proj.bias") and not n.endswith("key.bias")}
    assert model(views(size=48)).z1.shape == (8, 32)
    assert SimSiamModel(config)(views()[:, 0]).pooler_output.shape == (8, config.hidden_size)


def test_hidden_states_attentions_and_checkpointing_of_a_transformer():
    torch.manual_seed(0)
    model = SimSiamForPreTraining(small_config(backbone_config=ViTConfig(**VIT))).train()
    model.set_attn_implementation("eager")
    output = model(views(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    model.zero_grad()
    model(views()).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(views()).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-7)


def test_views_have_batch_statistics_of_their_own():
    model = small_model().train()
    pixel_values = views()
    output = model(pixel_values)
    alone = copy.deepcopy(small_model()).train()
    features = alone.backbone(pixel_values[:, 0]).pooler_output.flatten(1)
    torch.testing.assert_close(output.z1, alone.projector(features))
    torch.testing.assert_close(output.z1.mean(dim=0), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.z2.std(dim=0, correction=0), torch.ones(32), rtol=0, atol=1e-3)


def test_residual_blocks_start_as_the_identity():
    for layer_type in ("basic", "bottleneck"):
        config = ResNetConfig(embedding_size=8, layer_type=layer_type, hidden_sizes=[8, 16], depths=[2, 1])
        model = small_model(backbone_config=config)
        stages = model.backbone.encoder.stages
        last = [block.layer[-1].normalization.weight for stage in stages for block in stage.layers]
        assert len(last) == 3 and all((weight == 0).all() for weight in last)
        first = [block.layer[0].normalization.weight for stage in stages for block in stage.layers]
        assert all((weight == 1).all() for weight in first)


def test_linear_layers_start_as_torchs():
    with torch.random.fork_rng():
        weight = MLPHead([400, 300, 20])[0].weight
    model = small_model(projection_hidden_dim=300, projection_dim=400)
    bound = 1 / math.sqrt(300)
    assert 0.99 * bound < model.projector[3].weight.abs().max() <= bound
    assert 0 < model.projector.redundant_bias.abs().max() <= bound
    assert weight.abs().max() <= 1 / math.sqrt(400)


def test_pretrained_residual_blocks_stay_as_they_are(tmp_path):
    plain = ResNetModel(tiny_config().backbone_config)
    plain.save_pretrained(tmp_path)
    model = SimSiamForPreTraining.from_backbone(str(tmp_path), projection_dim=32, predictor_hidden_dim=8)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_cross_entropy_is_the_papers():
    p, z = torch.randn(4, 6), torch.randn(4, 6)
    by_hand = -(z.softmax(dim=1) * p.softmax(dim=1).log()).sum(dim=1).mean()
    torch.testing.assert_close(softmax_cross_entropy(p, z), by_hand)
    assert small_model(similarity="cross_entropy")(views()).loss > 1


def test_projector_layers_and_norms():
    def kinds(**settings):
        return [type(layer).__name__ for layer in small_model(**settings).projector]

    assert kinds(projection_layers=2) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert kinds(heads_batch_norm=False) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert kinds(projection_layers=1) == ["Linear", "BatchNorm1d"]
    model = small_model(heads_batch_norm=False)
    assert all(p.requires_grad for p in model.parameters()) and model.projector[0].bias is not None
    assert isinstance(small_model(use_predictor=False).predictor, torch.nn.Identity)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": "euclidean"}, "similarity is 'euclidean'"),
        ({"projection_layers": 0}, "projection_layers is 0"),
        ({"predictor_hidden_dim": 0}, "predictor_hidden_dim is 0"),
        ({"backbone_config": {"model_type": "bert"}}, "not 'bert'"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small_config(**settings)


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 3, 3, 32, 32), (4, 2, 32, 32)])
def test_pictures_without_two_views_are_refused(shape):
    with pytest.raises(ValueError, match="2 views of each picture"):
        small_model()(torch.randn(shape))


@pytest.mark.slow
def test_learns_and_ablations_do_less(tmp_path):
    """Fashion-MNIST, 400 steps: kNN rises well above the untrained encoder's.

    Without batch norm in the heads it does not; without stop-gradient the projections shrink, but in so short a run
    the pooled features suffer less than the paper's after 100 epochs on ImageNet.
    """
    from hf_masked import MultiViewImageProcessor
    from hf_masked.data import ResidentImageDataset, labelled_tensors, load_images
    from hf_masked.evaluation.knn import weighted_knn
    from hf_masked.training.arguments import PreTrainingArguments
    from hf_masked.training.trainer import PreTrainer

    processor = MultiViewImageProcessor(size=32, num_channels=1, image_mean=0.286, image_std=0.353, crop_fraction=1.0)
    source = load_images("fashion_mnist", "train")
    splits = [
        labelled_tensors(part, processor, limit=limit)
        for part, limit in ((source, 5000), (load_images("fashion_mnist", "test"), 2000))
    ]

    def accuracy(model) -> float:
        (train, labels), (test, test_labels) = (
            (extract_features(model, images, mean=processor.image_mean, std=processor.image_std), labels)
            for images, labels in splits
        )
        return weighted_knn(train, labels, test, test_labels)

    def pretrained(**settings) -> tuple[float, float, float]:
        """kNN accuracy before and after, and the last z_std in units of 1 / sqrt(D)."""
        backbone = ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"
        )
        model = small_model(backbone_config=backbone, projection_dim=128, predictor_hidden_dim=32, **settings)
        untrained = accuracy(model)
        args = PreTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=128,
            max_steps=400,
            learning_rate=0.15,
            logging_steps=50,
            weight_decay=5e-4,
            optim="sgd",
            optim_args="momentum=0.9",
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = ResidentImageDataset(source, processor)
        trainer = PreTrainer(model=model, args=args, processing_class=processor, train_dataset=dataset)
        trainer.train()
        z_std = [line["z_std"] for line in trainer.state.log_history if "z_std" in line][-1]
        return untrained, accuracy(model), z_std * math.sqrt(128)

    untrained, whole, z_std = pretrained()
    assert whole > untrained + 0.03 and z_std > 0.9, (untrained, whole, z_std)
    _, without_norm, _ = pretrained(heads_batch_norm=False)
    assert without_norm < whole - 0.03, (without_norm, whole)
    _, without_stop, z_std = pretrained(stop_gradient=False)
    assert without_stop < whole and z_std < 0.8, (without_stop, whole, z_std)
