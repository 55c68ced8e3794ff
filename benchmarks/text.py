"""Does a recipe of a masked language model learn? The loss on masked tokens of texts that it has not seen.

    python benchmarks/text.py recipes/mae_lm_wikitext2.yaml --seeds 0 1

Beside the trained model stand the same network with its initial weights, and the frequencies of the tokens in the
training split, which know nothing of the context. All are asked for the same tokens. Further flags go to the training
program.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, environment, write_result
from hf_masked.data.text import TextBlocks, TextDataset
from hf_masked.modeling.registry import get_variant
from hf_masked.training.cli import make_model, train
from hf_masked.training.modalities import modality_of
from hf_masked.training.recipes import parse

# Blocks that are asked for, and the seed of their masks.
BLOCKS, MASKS = 512, 12345
BATCH = 64


def held_out(source, processor) -> list[dict[str, torch.Tensor]]:
    """Batches of masked blocks, the same for every model."""
    data = TextDataset(TextBlocks(source, processor), processor)
    numbers = torch.linspace(0, len(data) - 1, min(BLOCKS, len(data))).long()
    batches = []
    for chunk in numbers.split(BATCH):
        drawn = data.__getitems__([(0, number) for number in chunk.tolist()])
        batches.append(processor.finish_training(drawn["tokens"], drawn["indices"], MASKS, 0))
    return batches


@torch.no_grad()
def judge(model, batches) -> dict[str, float]:
    """Mean loss in nats and accuracy over all masked tokens."""
    model.eval()
    loss = hits = tokens = 0.0
    for batch in batches:
        output, count = model(**batch), float(batch["bool_masked_pos"].sum())
        loss, hits, tokens = loss + float(output.loss) * count, hits + float(output.accuracy) * count, tokens + count
    return {"loss": loss / tokens, "accuracy": hits / tokens}


def judge_unigram(blocks: TextBlocks, vocab_size: int, batches) -> dict[str, float]:
    """The frequencies of the training tokens, one more of each, as predictions."""
    ids = torch.cat([blocks.sample(number) for number in range(len(blocks))])
    counts = torch.bincount(ids, minlength=vocab_size) + 1.0
    targets = torch.cat([batch["input_ids"][batch["bool_masked_pos"]] for batch in batches])
    losses = -(counts / counts.sum()).log()[targets]
    return {"loss": float(losses.mean()), "accuracy": float((targets == counts.argmax()).float().mean())}


def run(recipe: str, seed: int, flags: list[str]) -> dict:
    output = f"runs/text_{Path(recipe).stem}_{seed}"
    command = ["--config", recipe, "--seed", str(seed), "--output_dir", output, *flags]
    method, data, args = parse(command)
    torch.manual_seed(seed)
    untrained = make_model(get_variant(method.method), method)
    started = time.perf_counter()
    trainer = train(method, data, args)
    seconds = time.perf_counter() - started
    processor, config = trainer.processing_class, trainer.model.config
    modality = modality_of(config)
    batches = held_out(modality.open(data, data.test_split, config, processor), processor)
    blocks = TextBlocks(modality.open(data, data.train_split, config, processor), processor)
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "training_seconds": seconds,
        "rows": {
            "pretrained": judge(trainer.model.cpu(), batches),
            "untrained": judge(untrained, batches),
            "token frequencies": judge_unigram(blocks, config.vocab_size, batches),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args, flags = parser.parse_known_args()
    runs = {str(seed): run(args.recipe, seed, flags) for seed in args.seeds}
    rows = {
        name: {
            measure: statistics.mean(result["rows"][name][measure] for result in runs.values())
            for measure in ("loss", "accuracy")
        }
        for name in next(iter(runs.values()))["rows"]
    }
    result = {
        "recipe": args.recipe,
        "flags": flags,
        "blocks": BLOCKS,
        "rows": rows,
        "seeds": runs,
        "environment": environment(torch.device("cpu")),
    }
    print(write_result(f"text_{Path(args.recipe).stem}", result).relative_to(RESULTS.parents[1]), rows)


if __name__ == "__main__":
    main()
