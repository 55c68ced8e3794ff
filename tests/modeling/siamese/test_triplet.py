"""The triplet network against its reference, and every check of its spec (section 11)."""

import pytest
import torch
from torch.nn import functional as F

from hf_masked import TripletConfig, TripletForPreTraining, TripletModel
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sets import Triplets
from hf_masked.data.small_sets import digits
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.siamese.triplet import TripletNetConfig, tiny_config
from hf_masked.processing.multi_view import MultiViewImageProcessor
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.trainer import PreTrainer


def small_model(seed: int = 0, **settings) -> TripletForPreTraining:
    torch.manual_seed(seed)
    return TripletForPreTraining(TripletConfig(backbone_config=tiny_config().backbone_config, **settings)).eval()


def triplets(batch: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def distances(batch: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    near, far = 4 * torch.rand(2, batch, generator=generator, dtype=torch.float64)
    return near.requires_grad_(), far.requires_grad_()


# --- section 11: the loss ---


def test_the_loss_is_the_reference_s_mean_squared_error_of_the_softmax():
    model, (near, far) = small_model(), distances()
    # DistanceRatioCriterion.lua: softmax of [far, near] against [1, 0], the mean over both entries.
    ratio = torch.stack([far, near], dim=1).softmax(dim=1)
    expected = F.mse_loss(ratio, torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(ratio))
    torch.testing.assert_close(model.loss(near, far), expected, rtol=1e-12, atol=0)
    equal = torch.ones(3)
    assert model.loss(equal, equal) == 0.25


def test_the_loss_falls_with_the_margin_between_the_distances():
    model = small_model()
    losses = [float(model.loss(torch.tensor([1.0]), torch.tensor([1.0 + gap]))) for gap in (-3, -1, 0, 1, 3)]
    assert losses == sorted(losses, reverse=True) and 0 < losses[-1] < losses[0] < 1


def test_both_distances_pull_equally_and_against_each_other():
    near, far = distances()
    small_model().loss(near, far).backward()
    assert (near.grad > 0).all() and (far.grad < 0).all()
    torch.testing.assert_close(near.grad, -far.grad)


def test_the_anchor_gets_the_sum_of_both_gradients():
    model = small_model()
    anchor, positive, negative = torch.randn(3, 5, 8, dtype=torch.float64).unbind()
    parts = []
    for pull, push in ((anchor.clone().requires_grad_(), anchor), (anchor, anchor.clone().requires_grad_())):
        model.loss(model.distance(pull, positive), model.distance(push, negative)).backward()
        parts.append((pull if pull.requires_grad else push).grad)
    whole = anchor.clone().requires_grad_()
    model.loss(model.distance(whole, positive), model.distance(whole, negative)).backward()
    torch.testing.assert_close(whole.grad, sum(parts))


def test_order_of_the_batch_and_of_positive_and_negative():
    model, pixels = small_model(), triplets()
    output = model(pixels)
    torch.testing.assert_close(model(pixels[[3, 1, 0, 5, 2, 4]]).loss, output.loss)
    chance = torch.sigmoid(output.positive_distance - output.negative_distance)
    torch.testing.assert_close(output.loss, chance.square().mean())
    torch.testing.assert_close(model(pixels[:, [0, 2, 1]]).loss, (1 - chance).square().mean())


def test_equal_anchor_and_positive_have_finite_gradients():
    model, pixels = small_model(), triplets()
    pixels[:, 1] = pixels[:, 0]
    model(pixels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def test_the_margin_loss_is_torch_s():
    embeddings = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(0))
    anchor, positive, negative = embeddings.unbind(dim=1)
    euclidean = small_model(loss_type="margin", margin=0.7)
    expected = F.triplet_margin_loss(anchor, positive, negative, margin=0.7, eps=0)
    found = euclidean.loss(euclidean.distance(anchor, positive), euclidean.distance(anchor, negative))
    torch.testing.assert_close(found, expected)
    squared = small_model(loss_type="margin", distance="squared", margin=0.7)
    expected = F.triplet_margin_with_distance_loss(
        anchor, positive, negative, distance_function=lambda a, b: (a - b).square().sum(-1), margin=0.7
    )
    found = squared.loss(squared.distance(anchor, positive), squared.distance(anchor, negative))
    torch.testing.assert_close(found, expected)


def test_the_contrastive_baseline_is_the_loss_of_pairs():
    """Hadsell et al.: y d^2 / 2 for equal pairs, max(0, m - d)^2 / 2 for others; here one pair of each per triplet."""
    model, (near, far) = small_model(loss_type="contrastive", margin=2.0), distances()
    expected = 0.0
    for same, other in zip(near.tolist(), far.tolist(), strict=True):
        expected += same**2 / 2 + max(0.0, 2.0 - other) ** 2 / 2
    assert model.loss(near, far).item() == pytest.approx(expected / len(near), rel=1e-6)


def test_cosine_distances_and_unit_embeddings():
    model = small_model(normalize=True, distance="cosine")
    output = model(triplets())
    torch.testing.assert_close(output.embeddings.norm(dim=-1), torch.ones(6, 3))
    inner = (output.embeddings[:, 0] * output.embeddings[:, 1]).sum(-1)
    torch.testing.assert_close(output.positive_distance, 1 - inner)


# --- mining ---


def mined(mining: str, labels: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    model = small_model(mining=mining)
    near = model.distance(embeddings[:, 0], embeddings[:, 1])
    return model.mined_distance(embeddings, near, labels)


def test_mining_takes_the_negatives_that_a_loop_finds():
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(8, 3, 4, generator=generator)
    classes = torch.randint(3, (8,), generator=generator)
    labels = torch.stack([classes, classes, (classes + 1) % 3], dim=1)
    hardest, semi_hard = mined("hardest", labels, embeddings), mined("semi_hard", labels, embeddings)
    flat, flat_labels = embeddings.flatten(0, 1), labels.flatten()
    for row in range(8):
        anchor, near = embeddings[row, 0], (embeddings[row, 0] - embeddings[row, 1]).norm()
        others = [(anchor - flat[i]).norm() for i in range(24) if flat_labels[i] != classes[row]]
        torch.testing.assert_close(hardest[row], min(others))
        beyond = [distance for distance in others if distance > near]
        torch.testing.assert_close(semi_hard[row], min(beyond) if beyond else max(others))
    assert (semi_hard >= hardest).all() and (semi_hard > hardest).any()


def test_mining_without_classes_is_refused():
    with pytest.raises(ValueError, match=r"needs `classes`.*\(6, 3\)"):
        small_model(mining="hardest")(triplets())


# --- section 11: the paper's net ---


def test_the_paper_s_net_has_its_size_and_is_not_negative():
    model = TripletForPreTraining(TripletConfig()).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 505_088
    embeddings = model(triplets()).embeddings
    assert embeddings.shape == (6, 3, 128) and (embeddings >= 0).all()


def test_the_paper_s_net_drops_out_in_training_only():
    model, pixels = TripletForPreTraining(TripletConfig()), triplets()
    assert not torch.equal(model(pixels).embeddings, model(pixels).embeddings)
    model.eval()
    assert torch.equal(model(pixels).embeddings, model(pixels).embeddings)


def test_the_paper_s_net_names_the_size_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"28 x 28 pixels.*32 x 32"):
        TripletForPreTraining(TripletConfig())(torch.zeros(1, 3, 3, 28, 28))
    model = TripletForPreTraining(TripletConfig(backbone_config=TripletNetConfig(num_channels=1)))
    model.save_pretrained(tmp_path)
    pixels = torch.rand(2, 1, 32, 32)
    loaded = TripletModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        loaded(pixels).embedding, model.eval()(pixels[:, None].expand(-1, 3, -1, -1, -1)).embeddings[:, 0]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "hinge"}, "'hinge'.*distance_ratio"),
        ({"distance": "manhattan"}, "'manhattan'.*euclidean"),
        ({"mining": "easy"}, "'easy'.*semi_hard"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"embedding_dim": 0}, "embedding_dim is 0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        TripletConfig(**settings)


# --- section 11: end to end ---


def triplet_accuracy(model, processor, source: ArraySource) -> float:
    data = ResidentImageDataset(source, processor, training=False, sets=Triplets(source))
    batch = data.__getitems__([(0, index) for index in range(len(data))])
    with torch.no_grad():
        output = model.eval()(**processor.finish(batch["pixels"]), classes=batch["labels"])
    return float(output.triplet_accuracy)


@pytest.mark.parametrize("mining", ["none", "semi_hard"])
def test_training_orders_the_distances(tmp_path, mining):
    """Digits: other pictures of the eight classes are ordered far better than before, and those of two classes that
    were held out better than by chance."""
    splits = {split: digits(split)[1:3] for split in ("train", "test")}
    sources = {
        split: ArraySource(split, images[labels < 8], labels[labels < 8]) for split, (images, labels) in splits.items()
    }
    images, labels = splits["test"]
    unseen = ArraySource("8 and 9", images[labels >= 8], labels[labels >= 8])
    torch.manual_seed(0)
    backbone = TripletNetConfig(num_channels=1, hidden_sizes=(16, 32, 32, 32), dropout=0.0)
    model = TripletForPreTraining(TripletConfig(backbone_config=backbone, mining=mining))
    processor = MultiViewImageProcessor(**model.config.processor_settings(), image_mean=0.3, image_std=0.37)
    before = triplet_accuracy(model, processor, sources["test"])
    args = PreTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=64, max_steps=30, optim="sgd",
        optim_args="momentum=0.9", learning_rate=0.1, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = ResidentImageDataset(sources["train"], processor, sets=Triplets(sources["train"]))
    PreTrainer(model=model, args=args, processing_class=processor, train_dataset=data).train()
    after = triplet_accuracy(model, processor, sources["test"])
    assert after > 0.88 and after > before + 0.05, (before, after)
    assert triplet_accuracy(model, processor, unseen) > 0.6
