"""Masked diffusion beside a causal model of the same size, on characters: bounds and likelihoods of held-out text.

    python benchmarks/generation.py --text ../shared/data/text/tiny_shakespeare.txt --seconds 150

MD4, GenMD4 and a Llama of the same width, depth and nearly the same number of parameters learn from the first nine
tenths of the text for the same number of seconds each, with the same optimiser and batch, and are judged by the same
pieces of the last tenth. Of masked diffusion the figure is an upper bound on what of the causal model is exact. The
first character of each piece counts for all.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, write_result
from hf_masked import GenMD4Config, GenMD4ForPreTraining, MD4Config, MD4ForPreTraining, MD4TransformerConfig

LENGTH, WIDTH, LAYERS, HEADS, BATCH = 64, 128, 4, 4, 32
INTERMEDIATE = 352
JUDGED = 256  # pieces of held-out text
TIMES = 32  # at which the bound is taken


def characters(path: str) -> tuple[torch.Tensor, list[str]]:
    """int64 (characters,), and the alphabet."""
    text = Path(path).read_text()
    alphabet = sorted(set(text))
    number = {character: index for index, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]), alphabet


def pieces(ids: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """int64 (count, LENGTH), from random places."""
    starts = torch.randint(len(ids) - LENGTH, (count, 1), generator=generator)
    return ids[starts + torch.arange(LENGTH)]


class Causal(nn.Module):
    """A Llama that predicts each character from those before it, the first from a start token."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.start = vocab_size
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size + 1,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=INTERMEDIATE,
                max_position_embeddings=LENGTH,
            )
        )

    def bits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of each piece, per character: float32 (batch,)."""
        seen = torch.cat([torch.full_like(ids[:, :1], self.start), ids[:, :-1]], dim=1)
        logits = self.llama(seen).logits[..., : self.start]
        return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(dim=1) / math.log(2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bits(ids).mean()


def network(vocab_size: int) -> MD4TransformerConfig:
    return MD4TransformerConfig(
        vocab_size=vocab_size,
        max_length=LENGTH,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        time_features="none",  # the size is then the causal model's
        embedding_size=None,
    )


def learn(model: nn.Module, ids: torch.Tensor, seconds: float, learning_rate: float) -> int:
    """Trains for so many seconds; returns the number of steps. The learning rate falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.03)
    generator = torch.Generator().manual_seed(0)
    started, steps = time.process_time(), 0
    model.train()
    while (spent := (time.process_time() - started) / seconds) < 1:
        warm_up = min(1.0, (steps + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_up * (1 + math.cos(math.pi * spent)) / 2
        batch = pieces(ids, BATCH, generator)
        optimizer.zero_grad()
        loss = model(batch) if isinstance(model, Causal) else model(input_ids=batch).loss
        loss.backward()
        optimizer.step()
        steps += 1
    return steps


def judge(model: nn.Module, ids: torch.Tensor) -> dict:
    """Bits and nats per character and perplexity of held-out pieces."""
    model.eval()
    with torch.no_grad():
        if isinstance(model, Causal):
            bits = model.bits(ids).mean().item()
        else:
            bits = model.evidence_bound(input_ids=ids, num_times=TIMES).bits_per_token.mean().item()
    return {"bits_per_character": bits, "nats_per_character": bits * math.log(2), "perplexity": 2**bits}


def unigram_bits(learnt: torch.Tensor, judged: torch.Tensor, vocab_size: int) -> float:
    """Of the frequencies of single characters, the floor that a model has to beat."""
    shares = (torch.bincount(learnt, minlength=vocab_size) + 1).double()
    return -(shares / shares.sum()).log2()[judged].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seconds", type=float, default=100, help="of CPU time, for each model")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--name", default="generation_characters", help="of the file in benchmarks/results")
    arguments = parser.parse_args()
    ids, alphabet = characters(arguments.text)
    cut = len(ids) * 9 // 10
    judged = pieces(ids[cut:], JUDGED, torch.Generator().manual_seed(1))
    form = {"backbone_config": network(len(alphabet)), "average_momentum": None}
    makers = {
        "md4": lambda: MD4ForPreTraining(MD4Config(**form)),
        "genmd4": lambda: GenMD4ForPreTraining(GenMD4Config(**form)),
        "causal": lambda: Causal(len(alphabet)),
    }
    rows, samples = {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        model = make()
        steps = learn(model, ids[:cut], arguments.seconds, arguments.learning_rate)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows[name] = {"steps": steps, "parameters": parameters, **judge(model, judged)}
        print(name, rows[name], flush=True)
        if name != "causal":
            drawn = model.generate(2, steps=LENGTH, seed=0, progress=False).token_ids.tolist()
            samples[name] = ["".join(alphabet[index] for index in row) for row in drawn]
    result = {
        "text": Path(arguments.text).name,
        "setting": {
            "seconds_each": arguments.seconds,
            "batch": BATCH,
            "length": LENGTH,
            "learning_rate": arguments.learning_rate,
            "judged_pieces": JUDGED,
            "times_of_the_bound": TIMES,
        },
        "unigram_bits_per_character": unigram_bits(ids[:cut], judged, len(alphabet)),
        "models": rows,
        "samples": samples,
        "environment": environment(torch.device("cpu")),
    }
    write_result(arguments.name, result)


if __name__ == "__main__":
    main()
