"""One-shot accuracy."""

import pytest
import torch

from hf_masked.evaluation import load_metric
from hf_masked.evaluation.one_shot import one_shot_accuracy, one_shot_questions


def test_the_highest_score_answers():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.9, 0.3, 0.3], [0.1, 0.2, 0.6], [0.5, 0.4, 0.1]])
    found = one_shot_accuracy(scores, torch.tensor([1, 0, 0, 0]))
    assert found == {"accuracy": 0.75, "standard_error": pytest.approx((0.75 * 0.25 / 4) ** 0.5), "chance": 1 / 3}


def test_ties_are_guesses():
    assert one_shot_accuracy(torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64))["accuracy"] == 0.25
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert one_shot_accuracy(scores, torch.tensor([0, 2]))["accuracy"] == 0.25


def test_what_cannot_be_ranked_is_named():
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(3,\)"):
        one_shot_accuracy(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[0, 3\].*0 to 2"):
        one_shot_accuracy(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="not finite"):
        one_shot_accuracy(torch.full((1, 3), torch.nan), torch.tensor([0]))


def test_questions_ask_for_another_picture_of_a_class_that_is_shown():
    labels = torch.arange(60) % 12
    labels[-1] = 99  # a class of one picture, about which nothing can be asked
    scores, references = one_shot_questions(torch.nn.functional.one_hot(labels).float(), labels, ways=5, questions=200)
    assert scores.shape == (200, 5) and one_shot_accuracy(scores, references)["accuracy"] == 1.0
    assert (scores.sum(dim=1) == 1).all(), "each class is shown once"
    assert references.bincount(minlength=5).min() > 20
    noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    by_chance = one_shot_accuracy(*one_shot_questions(noise, labels, ways=5))
    assert abs(by_chance["accuracy"] - 0.2) < 0.1
    assert torch.equal(one_shot_questions(noise, labels, ways=5)[0], one_shot_questions(noise, labels, ways=5)[0])
    with pytest.raises(ValueError, match="ways is 13; 12 classes"):
        one_shot_questions(noise, labels, ways=13)


def test_it_is_a_module_of_evaluate():
    generator = torch.Generator().manual_seed(0)
    scores, references = torch.rand(20, 5, generator=generator), torch.randint(5, (20,), generator=generator)
    found = load_metric("one_shot_accuracy").compute(predictions=scores.tolist(), references=references.tolist())
    assert found == pytest.approx(one_shot_accuracy(scores, references))
