"""Two facts about transformers that the README states, shown by running them.

python benchmarks/facts.py positions   # ViTMAEForPreTraining from scratch has no positions
python benchmarks/facts.py resume      # the stock Trainer resumes a ViT from its initial weights
"""

import sys
import tempfile

import torch
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

from hf_masked import MAEConfig, MAEForPreTraining
from hf_masked.training.checkpoints import FaithfulCheckpointsMixin

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def positions() -> None:
    """Predictions at masked positions of one picture, from newly made models."""
    torch.manual_seed(0)
    picture = torch.randn(1, 3, 32, 32)
    models = {
        "transformers ViTMAEForPreTraining": ViTMAEForPreTraining(ViTMAEConfig(**SIZES)),
        "hf_masked MAEForPreTraining": MAEForPreTraining(MAEConfig(backbone_config=ViTConfig(**SIZES))),
    }
    for name, model in models.items():
        output = model.eval()(picture)
        predictions = output.logits[0, output.mask[0].bool()].detach()
        spread = (predictions - predictions[0]).abs().max().item()
        print(f"{name:36} largest difference between predictions at two masked positions: {spread:.2e}")


class FaithfulTrainer(FaithfulCheckpointsMixin, Trainer):
    """The stock Trainer, loading checkpoints as `from_pretrained` does."""


def resume() -> None:
    """Eight steps at once, against four and then four more from the checkpoint."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(i % 2)} for i in range(32)
    ]
    for trainer_class in (Trainer, FaithfulTrainer):
        with tempfile.TemporaryDirectory() as folder:
            weights = [
                _train(trainer_class, f"{folder}/whole", samples, None),
                _train(trainer_class, f"{folder}/resumed", samples, f"{folder}/whole/checkpoint-4"),
            ]
        difference = max((a - b).abs().max().item() for a, b in zip(*weights, strict=True))
        print(f"{trainer_class.__name__:18} largest difference between resumed and uninterrupted: {difference:.2e}")


def _train(trainer_class, folder, samples, checkpoint):
    set_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=2))
    args = TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3,
        save_steps=4, report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer_class(model=model, args=args, train_dataset=samples).train(resume_from_checkpoint=checkpoint)
    return [parameter.detach().clone() for parameter in model.parameters()]


if __name__ == "__main__":
    facts = {"positions": positions, "resume": resume}
    if len(sys.argv) != 2 or sys.argv[1] not in facts:
        sys.exit(__doc__)
    facts[sys.argv[1]]()
