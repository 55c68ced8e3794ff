"""Training: what pretraining needs beyond transformers' Trainer."""
