"""Official state dicts into the names of transformers."""

import re

import torch

# In a replacement, stands for each of q, k and v: the tensor is a stack of queries, keys and values.
QKV = "{qkv}"


def rename_weights(state_dict: dict[str, torch.Tensor], renaming: tuple[tuple[str, str], ...]) -> dict:
    """Applies (pattern, replacement) pairs of `re.sub` in their order to every name.

    Names that no pattern matches stay as they are, for strict loading to report. A name with `QKV` in it becomes
    three, each with a third of the tensor's rows.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in renaming:
            name = re.sub(pattern, replacement, name)
        if QKV not in name:
            renamed[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            renamed[name.replace(QKV, part)] = rows.clone()
    return renamed
