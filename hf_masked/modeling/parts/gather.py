"""Rows of all processes: what contrastive losses compare and queues hold."""

from collections.abc import Callable

import torch
import torch.distributed as dist


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(num_processes())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # Every process has its own loss on the gathered rows, and this one's rows are in all of them.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(num_processes())[process_rank()]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes in the order of their ranks; in one process the rows themselves.

    The gradient of a row is the sum of what the losses of all processes say of it. Under DDP, which averages the
    gradients of the weights, it is then that of the mean of these losses, as one process with all rows has it.

    Args:
        rows: (batch, ...), as many from each process.

    Returns:
        (batch * processes, ...).
    """
    return rows if num_processes() == 1 else _GatherRows.apply(rows)


def rows_of_this_process(rows: torch.Tensor) -> torch.Tensor:
    """Of the rows of all processes, (batch * processes, ...), this one's: (batch, ...)."""
    return rows.chunk(num_processes())[process_rank()]


@torch.no_grad()
def encode_shuffled(encode: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """`encode` on rows that have been dealt out among the processes at random, the same shuffle in all.

    Batch statistics then come from other rows than this process's own (MoCo, arXiv 1911.05722, section 3.3, "shuffling
    BN").

    Args:
        encode: (batch, ...) -> (batch, width).
        rows: (batch, ...), as many from each process.

    Returns:
        (batch * processes, width), the outputs for the rows of all processes, in the order of `gather_rows`.
    """
    order = torch.randperm(len(rows) * num_processes(), device=rows.device)
    dist.broadcast(order, src=0)
    encoded = encode(gather_rows(rows)[rows_of_this_process(order)])
    return gather_rows(encoded)[order.argsort()]
