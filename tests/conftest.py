"""Tests run beside each other: one thread each, or tiny models spend their time waiting.

None reaches the Hub; those of it start a server of their own. Offline, names of checkpoints that are not there fail at
once and not after retries.
"""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
