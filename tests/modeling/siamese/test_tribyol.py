"""TriBYOL against BYOL and by hand, and every check of its spec (section 11); what it shares with BYOL is tested
there."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import ResNetConfig

from hf_masked import (
    BYOLConfig,
    BYOLForPreTraining,
    MultiViewImageProcessor,
    TriBYOLConfig,
    TriBYOLForPreTraining,
    TriBYOLModel,
)
from hf_masked.data import ResidentImageDataset, labelled_tensors, load_images
from hf_masked.evaluation.features import extract_features
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.modeling.siamese.tribyol import tiny_config
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.trainer import PreTrainer
from tests.modeling.siamese.views import hard_views, moved, views

WIDTH = 16
SETTINGS = {
    "backbone_config": tiny_config().backbone_config,
    "projection_dim": WIDTH,
    "projection_hidden_dim": 32,
    "predictor_hidden_dim": 32,
}


def small_model(seed: int = 0, **settings) -> TriBYOLForPreTraining:
    torch.manual_seed(seed)
    return TriBYOLForPreTraining(TriBYOLConfig(**SETTINGS | settings))


def three_views(**settings) -> torch.Tensor:
    return views(num_views=3, **settings)


def encoded(networks, view: torch.Tensor) -> torch.Tensor:
    return networks.projector(networks.backbone(view).pooler_output.flatten(1))


def terms_of(model, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    projections = [encoded(model, view) for view in pixel_values.unbind(dim=1)]
    predictions = [model.predictor(projection) for projection in projections]
    return model.loss_terms(predictions, model.targets(pixel_values.unbind(dim=1), projections))


def parameters_of(model, name: str) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.get_submodule(name).named_parameters()}


# --- section 11: the targets and their updates ---


def test_both_targets_begin_as_copies_of_their_own():
    model = small_model()
    assert list(model.twins()) == ["target_1", "target_2"]
    for twin in model.twins().values():
        for name, value in twin.named_parameters():
            assert torch.equal(value, model.get_parameter(name)) and not value.requires_grad
    storages = [{tensor.data_ptr() for tensor in twin.parameters()} for twin in model.twins().values()]
    assert not storages[0] & storages[1]


def test_targets_take_turns():
    """After step 1 only target 1 has moved, after step 2 target 2 has too, and so on."""
    model = small_model(base_tau=0.9)
    for step in range(1, 5):
        before = {name: parameters_of(model, name) for name in model.twins()}
        moved(model.backbone, model.projector, seed=step)
        model.update_twins()
        mover, waiter = ("target_1", "target_2") if step % 2 else ("target_2", "target_1")
        for name, value in parameters_of(model, waiter).items():
            assert torch.equal(value, before[waiter][name]), (step, name)
        for name, value in parameters_of(model, mover).items():
            expected = 0.9 * before[mover][name] + 0.1 * model.get_parameter(name).detach()
            torch.testing.assert_close(value, expected, msg=f"{step} {name}")
        assert model.num_updates == step


def test_updated_together_they_stay_equal_and_alternately_they_do_not():
    for target_update in ("both", "alternate"):
        model = small_model(target_update=target_update)
        for step in range(3):
            moved(model.backbone, model.projector, seed=step)
            model.update_twins()
        first, second = (parameters_of(model, name) for name in model.twins())
        assert all(torch.equal(value, second[name]) for name, value in first.items()) == (target_update == "both")


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_limits_of_tau(tau):
    model = small_model(base_tau=tau)
    before = {name: parameters_of(model, name) for name in model.twins()}
    moved(model.backbone, model.projector)
    model.update_twins()
    model.update_twins()
    for name, values in before.items():
        for key, value in parameters_of(model, name).items():
            assert torch.equal(value, values[key] if tau else model.get_parameter(key)), (name, key)


def test_turn_is_saved_with_the_targets(tmp_path):
    model = small_model(base_tau=0.5)
    moved(model.backbone, model.projector)
    model.update_twins()
    model.train()(three_views())
    model.save_pretrained(tmp_path)
    loaded = TriBYOLForPreTraining.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not torch.equal(loaded.target_1.projector[0].weight, loaded.target_2.projector[0].weight)
    before = {name: parameters_of(loaded, name) for name in loaded.twins()}
    loaded.update_twins()
    moves = [any(not torch.equal(v, before[n][k]) for k, v in parameters_of(loaded, n).items()) for n in before]
    assert moves == [False, True]
    encoder = TriBYOLModel.from_pretrained(tmp_path).eval()
    picture = three_views()[:, 0]
    assert torch.equal(encoder(picture).projection, encoded(model.eval(), picture))


def test_nobody_is_told_that_the_waiting_target_stands_still(caplog):
    model = small_model()
    for step in range(3):
        model.train()
        moved(model.backbone, model.projector, seed=step)
        model.update_twins()
    assert "stands still" not in caplog.text
    other = small_model().train()
    moved(other.backbone, other.projector)
    other.train()
    assert caplog.text.count("stands still") == 2


# --- section 11: the loss and its gradients ---


def test_with_equal_targets_and_views_2_and_3_it_is_byols_loss():
    model = small_model().train()
    for twin in model.twins().values():
        moved(twin)  # the same for both
    torch.manual_seed(0)
    byol = BYOLForPreTraining(BYOLConfig(**SETTINGS)).train()
    for name in ("backbone", "projector", "predictor"):
        byol.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    byol.target.load_state_dict(model.target_1.state_dict())
    pixel_values = three_views()
    pixel_values[:, 2] = pixel_values[:, 1]
    output, expected = model(pixel_values), byol(pixel_values[:, :2])
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    output.loss.backward()
    expected.loss.backward()
    for name, parameter in byol.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_loss_by_hand():
    """Each pair's two directions, halved, through the target network of that pair."""
    model, pixel_values = small_model().train(), three_views()
    moved(model.target_1, seed=1)
    moved(model.target_2, seed=2)
    v1, v2, v3 = pixel_values.unbind(dim=1)
    alone = copy.deepcopy(model)

    def distance(p, z):
        return (F.normalize(p) - F.normalize(z)).square().sum(dim=1).mean()

    p1, p2, p3 = (alone.predictor(encoded(alone, view)) for view in (v1, v2, v3))
    with torch.no_grad():
        first = distance(p1, encoded(alone.target_1, v2)) / 2 + distance(p2, encoded(alone.target_1, v1)) / 2
        second = distance(p1, encoded(alone.target_2, v3)) / 2 + distance(p3, encoded(alone.target_2, v1)) / 2
    output = model(pixel_values)
    torch.testing.assert_close(output.loss, first + second)
    assert output.online_predictions.shape == (8, 3, WIDTH) and output.target_projections.shape == (8, 4, WIDTH)
    assert list(output.losses) == ["1_to_2", "2_to_1", "1_to_3", "3_to_1"]
    assert all(0 <= term <= 4 for term in output.losses.values())


def test_online_network_gets_gradient_from_four_terms_and_targets_get_none():
    sources = {"1_to_2": 0, "2_to_1": 1, "1_to_3": 0, "3_to_1": 2}
    for term, source in sources.items():
        model, pixel_values = small_model().train(), three_views().requires_grad_()
        terms_of(model, pixel_values)[term].backward()
        gradient = pixel_values.grad.abs().amax(dim=(0, 2, 3, 4))
        assert [bool(value > 0) for value in gradient] == [number == source for number in range(3)], term
        assert model.backbone.embedder.embedder.convolution.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for twin in model.twins().values() for parameter in twin.parameters())


def test_third_view_learns_through_its_own_term_alone():
    """With the weight of 3_to_1 at zero the online network's path of view 3 gets no gradient."""
    gradients = {}
    for weight in (0.0, 0.5):
        model, pixel_values = small_model().train(), three_views().requires_grad_()
        terms = terms_of(model, pixel_values)
        loss = sum(terms.values()) / 2 + (weight - 0.5) * terms["3_to_1"]
        loss.backward()
        gradients[weight] = pixel_values.grad[:, 2].abs().max()
    assert gradients[0.0] == 0 and gradients[0.5] > 0


# --- training ---


def trained(steps: int = 40, **settings):
    """The last step's output on hard views."""
    model = small_model(base_tau=0.9, **settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    data, generator = hard_views(2.0, num_views=3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        output = model(data[torch.randint(len(data), (32,), generator=generator)])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_twins()
    return output


def test_collapses_without_stop_gradient_and_predictor_and_not_with_them():
    healthy, collapsed = trained(), trained(stop_gradient=False, use_predictor=False)
    assert healthy.z_std > 0.3 / math.sqrt(WIDTH)
    assert collapsed.z_std < 0.1 / math.sqrt(WIDTH) and collapsed.loss < 0.05


@pytest.mark.slow
def test_learns_from_small_batches_and_more_than_byol(tmp_path):
    """Fashion-MNIST, 400 steps of 32 pictures: kNN rises above the untrained encoder's, and on average over three
    seeds TriBYOL's at least as far as BYOL's."""
    accuracies = {
        variant: [fashion_mnist(variant, seed, tmp_path) for seed in range(3)] for variant in (BYOL, TRIBYOL)
    }
    for runs in accuracies.values():
        assert all(after > before + 0.02 for before, after in runs), accuracies
    byol, tribyol = (sum(after for _, after in runs) / len(runs) for runs in accuracies.values())
    assert tribyol >= byol, accuracies


BYOL, TRIBYOL = (BYOLConfig, BYOLForPreTraining), (TriBYOLConfig, TriBYOLForPreTraining)


def fashion_mnist(variant, seed: int, output) -> tuple[float, float]:
    """kNN accuracy of the encoder before and after training."""
    config_class, model_class = variant
    backbone = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        image_size=32,
    )
    config = config_class(
        backbone_config=backbone,
        projection_dim=64,
        projection_hidden_dim=128,
        predictor_hidden_dim=128,
        base_tau=0.98,
        tau_schedule="constant",
    )
    jitter = {"jitter_probability": 0.8, "brightness": 0.4, "contrast": 0.4}
    settings = config.processor_settings() | {"crop_scale": (0.2, 1.0), "photometric": jitter}
    processor = MultiViewImageProcessor(**settings, image_mean=0.286, image_std=0.353, crop_fraction=1.0)
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

    torch.manual_seed(seed)
    model = model_class(config)
    untrained = accuracy(model)
    args = PreTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        seed=seed,
        per_device_train_batch_size=32,
        max_steps=400,
        learning_rate=0.03,
        weight_decay=4e-4,
        optim="sgd",
        optim_args="momentum=0.9",
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = ResidentImageDataset(source, processor)
    PreTrainer(model=model, args=args, processing_class=processor, train_dataset=dataset).train()
    return untrained, accuracy(model)


# --- settings ---


def test_views_are_t_and_twice_t_prime():
    processor = MultiViewImageProcessor(**TriBYOLConfig().processor_settings())
    first, *others = processor.photometric
    assert processor.num_views == 3 and others[0] == others[1] != first
    assert [s["blur_probability"] for s in processor.photometric] == [1.0, 0.1, 0.1]
    assert [s["solarize_probability"] for s in processor.photometric] == [0.0, 0.2, 0.2]


def test_widths_are_those_of_the_re_implementations():
    with torch.device("meta"):
        model = TriBYOLForPreTraining(TriBYOLConfig())
    assert model.projector[0].weight.shape == (512, 2048) and model.projector[-1].weight.shape == (128, 512)
    assert model.predictor[0].weight.shape == (512, 128) and model.predictor[-1].weight.shape == (128, 512)
    assert {model.target_1.momentum_at(progress) for progress in (0.0, 0.5, 1.0)} == {0.996}


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="target_update is 'never'"):
        TriBYOLConfig(**SETTINGS, target_update="never")
    with pytest.raises(ValueError, match="3 views of each picture"):
        small_model()(views())
