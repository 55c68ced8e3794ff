"""A classifier of a few hundred weights that the FISH Mask's reference was run with."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from tests.parity.fill import filled

WORDS, WIDTH, CLASSES = 12, 8, 3


class SmallClassifier(nn.Module):
    """Tokens (batch, length) -> mean of embeddings -> dense, norm, tanh -> logits (batch, 3)."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="small", to_dict=dict)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> ModelOutput:
        hidden = self.norm(self.dense(self.embedding(input_ids).mean(dim=1))).tanh()
        logits = self.classifier(hidden)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ModelOutput(loss=loss, logits=logits)


def filled_model() -> SmallClassifier:
    model = SmallClassifier()
    model.load_state_dict(filled({name: tuple(weight.shape) for name, weight in model.state_dict().items()}))
    return model


def examples() -> list[dict]:
    """Eight texts of five words."""
    return [
        {
            "input_ids": torch.tensor([(3 * row + 5 * place * place + row * place) % WORDS for place in range(5)]),
            "labels": torch.tensor(row % CLASSES),
        }
        for row in range(8)
    ]


def one_batch() -> dict[str, torch.Tensor]:
    rows = examples()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
