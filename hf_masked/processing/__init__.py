"""Processors, masks and views. Imports nothing from `hf_masked.modeling` or `hf_masked.training`."""
