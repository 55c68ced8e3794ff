"""Linear classification of frozen features: MAE's batch-norm head and logistic regression."""

from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from hf_masked.training.optimization import LARS

HEADS = ("batchnorm", "reference", "logistic")


def linear_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    head: str = "batchnorm",
    seed: int = 0,
    **options,
) -> dict[str, float]:
    """Trains a linear classifier on frozen features.

    Args:
        train_features: float (n, width); the batch-norm head is trained on their device.
        train_labels: int64 (n,), classes from 0.
        test_features: float (m, width).
        test_labels: int64 (m,).
        head: "batchnorm", see `batchnorm_head`; "reference", see `reference_head`; "logistic", see `logistic_head`.
        seed: of initial weights and of the order of the pictures.
        options: further arguments of the head.

    Returns:
        {"accuracy", "train_accuracy"}, shares of the pictures.

    Raises:
        ValueError: for another head.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
    fit = {"batchnorm": batchnorm_head, "reference": reference_head, "logistic": logistic_head}[head]
    predict = fit(train_features, train_labels, seed=seed, **options)
    return {
        "accuracy": _accuracy(predict(test_features), test_labels),
        "train_accuracy": _accuracy(predict(train_features), train_labels),
    }


def batchnorm_head(
    features: torch.Tensor,
    labels: torch.Tensor,
    seed: int = 0,
    steps: int = 7000,
    warmup: float = 1 / 9,
    batch_size: int = 512,
    learning_rate: float = 6.4,
    weight_decay: float = 0.0,
):
    """MAE's linear probe (appendix A.1 and `main_linprobe.py`): batch norm without weights, then a linear layer.

    LARS with momentum 0.9, warm-up, then half a cosine to 0. The paper trains 90 epochs of ImageNet, 10 of them
    warm-up, with batches of 16,384 and the learning rate 0.1 x 16,384 / 256. LARS moves weights by a share of their
    norm in each step, so their growth depends on the number of steps and not of pictures: on small data the defaults
    keep the paper's steps and learning rate, and take smaller batches.

    Args:
        warmup: share of the steps in which the learning rate rises.

    Returns:
        A function from float (n, width) to predicted classes, int64 (n,).
    """
    generator = torch.Generator().manual_seed(seed)
    device = features.device
    features, labels = features.float(), labels.to(device)
    linear = nn.utils.skip_init(nn.Linear, features.shape[1], int(labels.max()) + 1)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6), linear).to(device)
    optimizer = LARS(linear.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(steps * warmup), steps)
    for batch in islice(_batches(len(features), batch_size, generator), steps):
        batch = batch.to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(features[batch]), labels[batch]).backward()
        optimizer.step()
        scheduler.step()
    model.eval()

    @torch.inference_mode()
    def predict(features):
        return model(features.to(device).float()).argmax(dim=1)

    return predict


def reference_head(
    features: torch.Tensor, labels: torch.Tensor, seed: int = 0, epochs: int = 90, batch_size: int = 512
):
    """`batchnorm_head` as the reference's program sets it for any data (`main_linprobe.py`): 90 epochs, 10 of them
    warm-up, and the learning rate 0.1 x batch / 256.

    On small data this stops long before the head has converged, which favours features that separate the classes
    well over features that merely contain them: the untrained network's above all.

    Returns:
        See `batchnorm_head`.
    """
    steps = epochs * max(1, len(features) // batch_size)
    learning_rate = 0.1 * batch_size / 256
    return batchnorm_head(features, labels, seed, steps=steps, batch_size=batch_size, learning_rate=learning_rate)


def logistic_head(features: torch.Tensor, labels: torch.Tensor, seed: int = 0, C: float = 1.0, max_iter: int = 1000):
    """scikit-learn's logistic regression on standardised features, for small data.

    Args:
        C: inverse strength of the L2 penalty, as in scikit-learn.
        max_iter: most iterations of L-BFGS.

    Returns:
        A function from float (n, width) to predicted classes, int64 (n,) on the CPU.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter, random_state=seed))
    classifier.fit(features.float().cpu().numpy(), labels.cpu().numpy())
    return lambda features: torch.from_numpy(classifier.predict(features.float().cpu().numpy()))


def _batches(count: int, batch_size: int, generator: torch.Generator):
    """Shuffled passes over `count` samples, for ever; each drops its last, smaller batch, as the reference does."""
    while True:
        yield from (
            batch
            for batch in torch.randperm(count, generator=generator).split(batch_size)
            if len(batch) == min(batch_size, count)
        )


def _accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    return float((predicted.cpu() == labels.cpu()).float().mean())
