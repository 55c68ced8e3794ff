"""Judging encoders of graphs: links that were held out, and classes of nodes."""

import torch
from torch import nn
from torch.nn import functional as F

from hf_masked.data.graphs import LinkSplit


@torch.no_grad()
def link_prediction(model, processor, split: LinkSplit, part: str = "test") -> dict[str, float]:
    """How well a model tells edges that were held out from pairs without an edge.

    Args:
        model: has `link_scores`, as Bandana's models.
        processor: a `GraphProcessor`.
        split: of `split_links`; the model sees the training edges.
        part: "validation" or "test".

    Returns:
        {"link_auc", "link_ap"}: area under the ROC curve, average precision.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    device, was_training = model.device, model.training
    inputs = {name: value.to(device) for name, value in processor.prepare(split.graph).items()}
    pairs = [split.positive[part], split.negative[part]]
    model.eval()
    scores = model.link_scores(**inputs, edge_label_index=torch.cat(pairs, dim=1).to(device)).cpu()
    model.train(was_training)
    truth = torch.cat([torch.ones(pairs[0].shape[1]), torch.zeros(pairs[1].shape[1])])
    return {
        "link_auc": float(roc_auc_score(truth, scores)),
        "link_ap": float(average_precision_score(truth, scores)),
    }


def node_probe(
    features: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    weight_decay: float = 5e-3,
    learning_rate: float = 0.01,
    epochs: int = 100,
    batch_size: int = 512,
    seed: int = 0,
) -> dict[str, float]:
    """Bandana's linear classifier of frozen features (`train_node.py`): Adam, the epoch of the best validation.

    Args:
        features: "train", "validation" and "test" -> float32 (n, width).
        labels: likewise, int64 (n,), classes from 0.
        weight_decay: added to the gradients; 5e-3 on Cora, 0.1 on Citeseer.
        seed: of the initial weights and of the order.

    Returns:
        {"validation_accuracy", "test_accuracy"} at the epoch that is best, the last of several, in validation.
    """
    classes = int(max(part.max() for part in labels.values())) + 1
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(features["train"].shape[1], classes)
    nn.init.xavier_uniform_(classifier.weight, generator=generator)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate, weight_decay=weight_decay)
    best = {"validation_accuracy": 0.0, "test_accuracy": 0.0}
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels["train"]), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(classifier(features["train"][chosen]), labels["train"][chosen]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = {
                f"{part}_accuracy": float((classifier(features[part]).argmax(1) == labels[part]).float().mean())
                for part in ("validation", "test")
            }
        if accuracy["validation_accuracy"] >= best["validation_accuracy"]:
            best = accuracy
    return best


@torch.no_grad()
def node_accuracy(model, propagated_x: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the nodes that a classifier such as `SGCForNodeClassification` gets right.

    Args:
        model: takes `propagated_x`.
        propagated_x: float (nodes, features), filtered.
        labels: int64 (nodes,).
    """
    logits = model(propagated_x=propagated_x.to(model.device)).logits
    return float((logits.argmax(dim=1).cpu() == labels).float().mean())
