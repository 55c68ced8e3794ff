"""Masked modelling and Siamese learning for transformers."""
