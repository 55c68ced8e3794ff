"""Recall@k and mean average precision against scikit-learn and a count by hand."""

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from hf_masked.evaluation.metrics import load_metric
from hf_masked.evaluation.retrieval import nearest, retrieval


def data(count: int = 60, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize("chunk_size", [7, 512])
def test_figures_are_those_of_a_loop_over_the_queries(chunk_size):
    features, labels = data()
    similarity = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    precisions, found = [], {1: 0, 3: 0}
    for query in range(len(features)):
        others = [number for number in range(len(features)) if number != query]
        right = (labels[others] == labels[query]).numpy()
        precisions.append(average_precision_score(right, similarity[query, others].numpy()))
        order = sorted(range(len(others)), key=lambda place: -similarity[query, others[place]])
        for k in found:
            found[k] += any(right[place] for place in order[:k])
    figures = retrieval(features, labels, ks=(1, 3), chunk_size=chunk_size)
    assert figures["mean_average_precision"] == pytest.approx(sum(precisions) / len(precisions), rel=1e-6)
    assert figures["recall@1"] == found[1] / 60 and figures["recall@3"] == found[3] / 60


def test_a_gallery_of_its_own_is_ranked_whole():
    features, labels = torch.eye(3), torch.tensor([0, 1, 7])
    gallery = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    figures = retrieval(features, labels, gallery, torch.tensor([0, 1, 1]), ks=(1, 2))
    # The first query finds class 0 second; the second one finds class 1 first and third; the third has no class there.
    assert figures == {"recall@1": 0.5, "recall@2": 1.0, "mean_average_precision": pytest.approx((1 / 2 + 5 / 6) / 2)}


def test_classes_of_one_picture_are_left_out():
    features, labels = torch.eye(3), torch.tensor([0, 0, 1])
    assert retrieval(features, labels, ks=(2,))["recall@2"] == 1.0
    with pytest.raises(ValueError, match="nothing to retrieve"):
        retrieval(features, torch.arange(3), ks=(1,))


def test_too_many_neighbours_are_refused():
    with pytest.raises(ValueError, match="k is 3; it must lie in 1 to 2"):
        retrieval(torch.eye(3), torch.zeros(3), ks=(3,))


def test_nearest_neighbours_are_the_most_similar_others():
    features, _ = data()
    similarity, neighbours = nearest(features, queries=4, count=3)
    cosines = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    for query in range(4):
        others = sorted((n for n in range(60) if n != query), key=lambda n: -cosines[query, n])
        assert neighbours[query].tolist() == others[:3]
        torch.testing.assert_close(similarity[query], cosines[query, others[:3]])
    with pytest.raises(ValueError, match="60 neighbours are asked for, and there are 59"):
        nearest(features, queries=1, count=60)


def test_it_is_a_module_of_evaluate(offline):
    features, labels = data()
    metric = load_metric("retrieval")
    found = metric.compute(predictions=None, references=labels.tolist(), features=features.tolist(), ks=[1, 3])
    assert found == pytest.approx(retrieval(features, labels, ks=(1, 3)))
