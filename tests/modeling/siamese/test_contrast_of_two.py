"""Contrastive losses, queues and shuffled batch norm over two processes: 2 processes x n equal 1 process x 2n.

That whole steps are equal, gradients of all weights included, the conformance suite shows (`-k "moco or simclr"`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_masked.modeling.parts.losses import nt_xent
from tests.modeling.siamese.test_moco import small_model, views

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.xdist_group("two processes")

SCRIPT = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hf_masked.training.launch import disconnect
from hf_masked.modeling.parts.gather import encode_shuffled, gather_rows
from tests.modeling.siamese import test_contrast_of_two as test
from tests.modeling.siamese.test_moco import small_model, views

dist.init_process_group("gloo")
rank = dist.get_rank()
found = {}

model = DistributedDataParallel(test.encoder())
loss = test.contrast(model, test.pictures()[4 * rank : 4 * rank + 4])
loss.backward()
found["loss"], found["gradient"] = loss.detach(), model.module.weight.grad

rows = torch.arange(4.0).unsqueeze(1) + 10 * rank
seen = []
torch.manual_seed(rank)  # the shuffle is the first process's, whatever the others would draw
encoded = encode_shuffled(lambda dealt: seen.append(dealt) or 2 * dealt, rows)
found["gathered"], found["encoded"], found["seen"] = gather_rows(rows), encoded, seen[0]

model = small_model().train()
output = model(views(8)[4 * rank : 4 * rank + 4])
found["queue"], found["pointer"], found["key"] = model.queue(), model.queue.pointer, output.key
found["plain keys"] = gather_rows(small_model().train()._keys(views(8)[4 * rank : 4 * rank + 4, 1]))

torch.save(found, f"{sys.argv[1]}/{rank}.pt")
del model
disconnect()
"""


def encoder() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias=False)


def pictures() -> torch.Tensor:
    return torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(0))


def contrast(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    first, second = F.normalize(model(pictures), dim=-1).unbind(dim=1)
    return nt_xent(first, second, 0.2)[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    subprocess.run(
        [*command, str(folder / "two.py"), str(folder)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_nt_xent_of_two_processes_is_that_of_one(found):
    """Loss and gradient, with the gradients averaged by DDP."""
    model = encoder()
    loss = contrast(model, pictures())
    loss.backward()
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, loss.detach())
    assert found[0]["loss"] != found[1]["loss"]
    for each in found:
        torch.testing.assert_close(each["gradient"], model.weight.grad)


def test_shuffled_rows_come_back_in_order(found):
    rows = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13]).unsqueeze(1)
    for each in found:
        assert torch.equal(each["gathered"], rows) and torch.equal(each["encoded"], 2 * rows)
    dealt = torch.cat([each["seen"] for each in found])
    assert sorted(dealt.flatten().tolist()) == rows.flatten().tolist()
    assert not torch.equal(dealt, rows) and found[0]["seen"].max() >= 10, "each has rows of the other"


def test_queues_hold_the_keys_of_both_in_order(found):
    assert torch.equal(found[0]["queue"], found[1]["queue"])
    assert torch.equal(found[0]["queue"][:8], torch.cat([each["key"] for each in found]))
    assert all(each["pointer"] == 8 for each in found)
    assert torch.equal(found[0]["queue"][8:], small_model().queue()[8:])


def test_batch_norm_of_the_key_encoder_sees_shuffled_pictures(found):
    """The same pictures, other company: close to, and not equal to, keys from each process's own batch."""
    shuffled, plain = found[0]["queue"][:8], found[0]["plain keys"]
    assert not torch.allclose(shuffled, plain, atol=1e-4)
    whole = small_model().train()._keys(views(8)[:, 1])
    assert torch.equal((shuffled @ whole.T).argmax(dim=1), torch.arange(8)), "each key is its own picture's"
