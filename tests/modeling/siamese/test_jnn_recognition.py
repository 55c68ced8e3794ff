"""The joint neural network for recognition against its reference, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hf_masked import JNNForPairClassification, JNNRecognitionConfig, JNNRecognitionModel
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sets import ClassPairs
from hf_masked.data.small_sets import digits
from hf_masked.data.sources import ArraySource
from hf_masked.evaluation.one_shot import one_shot_accuracy
from hf_masked.modeling.parts.joint import JointConv
from hf_masked.modeling.siamese.jnn_recognition import (
    JNNEncoderConfig,
    convert_official_weights,
    official_config,
    tiny_config,
)
from hf_masked.processing.multi_view import MultiViewImageProcessor
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.trainer import PreTrainer
from tests.parity.fill import filled, filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "jnn_recognition.json").read_text())["pretraining"]


def small_model(seed: int = 0, **settings) -> JNNForPairClassification:
    torch.manual_seed(seed)
    config = tiny_config().to_dict() | settings
    return JNNForPairClassification(JNNRecognitionConfig(**config)).eval()


def pairs(batch: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.tensor([[0, 0], [0, 1], [5, 2], [3, 3]])


# --- the reference ---


def test_the_reference_s_loss_logits_and_gradients():
    weights = filled(PARITY["parameters"])
    config = official_config(weights)
    config.classifier_hidden_size = len(weights["classifier.1.bias"])  # the reference was run with a narrow classifier
    model = JNNForPairClassification(config)
    model.load_state_dict(convert_official_weights(weights, config))
    model = model.double().eval()
    names = dict(zip(convert_official_weights(weights, config), weights, strict=True))
    pixels = [(filled_pixels((2, 3, 224, 224), f"jnn.{which}").double() + 2) / 4 for which in ("query", "target")]
    output = model(torch.stack(pixels, dim=1), classes=torch.tensor([[0, 0], [0, 1]]))
    output.loss.backward()

    def close(found, expected, rtol=1e-6):
        torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-9)

    close(output.logits, PARITY["logits"])
    close(output.loss, PARITY["loss"])
    close(output.last_hidden_state[:, ::32], PARITY["features"])
    # The loss is float32, whose rounding all gradients have in common.
    for name, parameter in model.named_parameters():
        close(parameter.grad.norm(), PARITY["gradient_norms"][names[name]], rtol=1e-5)
    with torch.no_grad():
        swapped = model(torch.stack(pixels[::-1], dim=1), return_loss=False)
    close(swapped.logits, PARITY["swapped"])


# --- section 11: sizes ---


def test_the_paper_s_network_has_its_size():
    with torch.device("meta"):
        model = JNNForPairClassification(JNNRecognitionConfig())
        output = model(torch.empty(2, 2, 3, 224, 224), return_loss=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 61_579_713
    assert output.last_hidden_state.shape == (2, 256, 6, 6) and output.logits.shape == (2,)


# --- section 11: two streams ---


def test_gradients_reach_the_first_stage_through_both_pictures():
    model, pixels = small_model(), pairs().requires_grad_()
    model(pixels, CLASSES).loss.backward()
    assert (pixels.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    weight = model.backbone.stages[0].block.convolution.weight
    whole = weight.grad.clone()
    for view in range(2):  # a black picture leaves the weights of its stream without a gradient
        model.zero_grad()
        black = pairs()
        black[:, view] = 0
        model(black, CLASSES).loss.backward()
        assert weight.grad.abs().max() > 0 and not torch.allclose(weight.grad, whole)


def test_the_order_of_the_pictures_matters():
    model, pixels = small_model(), pairs()
    straight, swapped = model(pixels, CLASSES).logits, model(pixels.flip(1), CLASSES).logits
    assert (straight - swapped).abs().min() > 1e-4


def test_joints_that_copy_the_first_map_ignore_the_second_picture():
    model, pixels = small_model(), pairs()
    other = torch.stack([pixels[:, 0], pairs(seed=1)[:, 1]], dim=1)
    assert not torch.allclose(model(other, CLASSES).logits, model(pixels, CLASSES).logits)
    for joint in model.joints.values():
        joint.copy_first()
    found = model(pixels, CLASSES)
    assert torch.equal(model(other, CLASSES).logits, found.logits)
    alone = model.backbone(pixels[:, 0]).last_hidden_state  # ReLUs once more change nothing
    torch.testing.assert_close(found.last_hidden_state, alone)


def test_a_joint_convolution_keeps_the_shape_and_names_maps_that_differ():
    joint = JointConv(6, kernel_size=5, batch_norm=True, negative_slope=0.1)
    assert joint(torch.randn(2, 6, 7, 9), torch.randn(2, 6, 7, 9)).shape == (2, 6, 7, 9)
    with pytest.raises(ValueError, match=r"\(1, 6, 4, 4\) and \(1, 6, 8, 8\)"):
        joint(torch.randn(1, 6, 4, 4), torch.randn(1, 6, 8, 8))


def test_without_joints_it_is_a_siamese_network():
    model, pixels = small_model(joint_stages=()), pairs()
    assert not list(model.joints)
    output = model(pixels, CLASSES)
    first, second = (model.backbone(view).last_hidden_state for view in pixels.unbind(dim=1))
    torch.testing.assert_close(output.last_hidden_state, (first - second).abs())
    torch.testing.assert_close(model(pixels.flip(1), CLASSES).logits, output.logits)


@pytest.mark.parametrize("stages", [(1,), (2, 4), (1, 2, 3, 4, 5)])
def test_any_stages_can_be_joint(stages):
    model, pixels = small_model(joint_stages=stages), pairs()
    model(pixels, CLASSES).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.merge(*pixels.unbind(dim=1)).shape == (4, 16, 3, 3)


# --- the loss and one-shot episodes ---


def test_0_is_the_same_class_and_1_is_another():
    model, pixels = small_model(), pairs()
    output = model(pixels, CLASSES)
    expected = [F.softplus(logit if same else -logit) for logit, same in zip(output.logits, (1, 0, 0, 1), strict=True)]
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    right = [bool(logit < 0) == same for logit, same in zip(output.logits, (1, 0, 0, 1), strict=True)]
    assert output.pair_accuracy == sum(right) / 4
    model.classifier[-1].bias.data += 100  # surely different
    assert model(pixels, torch.tensor([[0, 1]] * 4)).loss < 1e-6 and model(pixels, CLASSES * 0).loss > 10


def test_episodes_are_scored_picture_by_picture():
    model = small_model()
    query, support = pairs(3)[:, 0], pairs(15, seed=1)[:, 0].unflatten(0, (3, 5))
    scores = model.predict_same(query, support)
    assert scores.shape == (3, 5)
    for episode in range(3):
        for way in range(5):
            pair = torch.stack([query[episode], support[episode, way]])[None]
            expected = -model(pair, return_loss=False).logits
            torch.testing.assert_close(scores[episode, way], expected[0])
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\).*\(3, 5, 3, 32, 32\)"):
        model.predict_same(query[:2], support)


def test_pictures_show_how_surely_the_class_is_the_same():
    model, pixels = small_model(), pairs()
    for bias, filling in ((100.0, 0.0), (-100.0, 0.6)):
        model.classifier[-1].bias.data.fill_(bias)
        panels = model.pictures(pixels)
        assert torch.equal(panels["target"], pixels[:, 1]) and torch.all(panels["same class?"] == filling)


def test_one_checkpoint_gives_the_merged_map(tmp_path):
    model, pixels = small_model(), pairs()
    model.save_pretrained(tmp_path)
    merged = JNNRecognitionModel.from_pretrained(tmp_path).eval()(pixels)
    torch.testing.assert_close(merged.last_hidden_state, model(pixels, return_loss=False).last_hidden_state)
    assert merged.pooler_output.shape == (4, 16)


def test_what_cannot_be_is_named():
    model = small_model()
    with pytest.raises(ValueError, match=r"`classes` is None.*\(4, 2\)"):
        model(pairs())
    with pytest.raises(ValueError, match=r"`classes` is \(4,\)"):
        model(pairs(), CLASSES[:, 0])
    with pytest.raises(ValueError, match=r"14 x 14 pixels.*15 x 15"):
        model(torch.zeros(1, 2, 3, 14, 14), CLASSES[:1])
    assert model(torch.zeros(1, 2, 3, 15, 15), CLASSES[:1]).last_hidden_state.shape[-2:] == (1, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"joint_stages": (2, 1)}, r"\(2, 1\).*ascending"),
        ({"joint_stages": (0,)}, "1 to 5"),
        ({"pooled_size": 0}, "pooled_size is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        JNNRecognitionConfig(**settings)
    with pytest.raises(ValueError, match="5 convolutions"):
        JNNEncoderConfig(hidden_sizes=(8, 8))


# --- section 11: end to end ---

SEEN = 7


def train_on_digits(folder, joint_stages: tuple[int, ...], steps: int = 100) -> JNNForPairClassification:
    images, labels = digits("train")[1:3]
    source = ArraySource("seen digits", images[labels < SEEN], labels[labels < SEEN])
    torch.manual_seed(0)
    encoder = JNNEncoderConfig(
        num_channels=1, hidden_sizes=(16, 32, 32, 32, 32), kernel_size=5, stride=1, image_size=24
    )
    config = JNNRecognitionConfig(
        backbone_config=encoder, joint_stages=joint_stages, pooled_size=2, classifier_hidden_size=64, dropout=0.0
    )
    model = JNNForPairClassification(config)
    processor = MultiViewImageProcessor(**config.processor_settings())
    args = PreTrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=64, max_steps=steps, learning_rate=2e-3,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = ResidentImageDataset(source, processor, sets=ClassPairs(source))
    PreTrainer(model=model, args=args, processing_class=processor, train_dataset=data).train()
    return model.eval()


def unseen_figures(model: JNNForPairClassification) -> tuple[float, float]:
    """Accuracy of pairs, and of 3-way one-shot questions, of the three classes that were held out."""
    images, labels = (part[digits("train")[2] >= SEEN] for part in digits("train")[1:3])
    processor = MultiViewImageProcessor(**model.config.processor_settings())
    source = ArraySource("unseen digits", images, labels)
    data = ResidentImageDataset(source, processor, training=False, sets=ClassPairs(source))
    batch = data.__getitems__([(0, index) for index in range(len(data))])
    with torch.no_grad():
        pair_accuracy = model(**processor.finish(batch["pixels"]), classes=batch["labels"]).pair_accuracy
        pixels = processor.finish(processor.prepare(list(images)))["pixel_values"]
        by_class = [pixels[torch.from_numpy(labels == label)] for label in range(SEEN, 10)]
        count = min(map(len, by_class)) // 2
        support = torch.stack([part[:count] for part in by_class], dim=1)  # (episodes, 3, ...)
        scores = torch.cat([model.predict_same(part[count : 2 * count], support) for part in by_class])
    return float(pair_accuracy), one_shot_accuracy(scores, torch.arange(3).repeat_interleave(count))["accuracy"]


@pytest.mark.slow
def test_it_tells_unseen_classes_apart_and_better_than_the_baseline(tmp_path):
    """Digits: seven classes are seen in training, three are not."""
    pair_accuracy, one_shot = unseen_figures(train_on_digits(tmp_path / "joint", (1, 2, 3)))
    baseline, _ = unseen_figures(train_on_digits(tmp_path / "siamese", ()))
    assert pair_accuracy > 0.6 and pair_accuracy > baseline, (pair_accuracy, baseline)
    assert one_shot > 0.45, one_shot
