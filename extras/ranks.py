"""Many processes as one.

`torchrun --nproc_per_node 8 genie_mini.py train` starts this program 8 times ("ranks"). Each takes
its slice of the batch; summed over the ranks, gradients and codebook statistics are those of the
whole batch, so that all ranks take the same step, and it is the step that one process would have
taken. Without torchrun none of this does anything.

PyTorch's DistributedDataParallel sums gradients as well, and sends them during the backward pass.
It is not used: it knows nothing of codebooks, which are most of what is shared here, it would wrap
each model, and with micro-batches it must be told when not to send. `sum_over` is one message a
step.
"""

import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, RANKS = 0, 1              # which process this is, and of how many


def join():
    """Meet the other ranks, if torchrun started us. From then on rank 0 alone speaks."""
    global RANK, RANKS
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))    # rank 0 may validate for long
    atexit.register(dist.destroy_process_group)
    RANK, RANKS = dist.get_rank(), dist.get_world_size()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def sum_over(tensors):
    """Put into each tensor its sum over all ranks, in a single message."""
    if RANKS > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def gather(t):
    """t (M, ...) of every rank, joined in their order, which is that of the batch."""
    if RANKS == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(RANKS)]
    dist.all_gather(parts, t)
    return torch.cat(parts)


def of_rank_0(t):
    """The t of rank 0, so that all ranks go on from the very same numbers."""
    if RANKS > 1:
        dist.broadcast(t, 0)
    return t


def largest(number, device):
    """The largest of all ranks' whole numbers. So if one is asked to stop, all stop after the same
    step; or some would wait for it forever."""
    if RANKS == 1:
        return number
    number = torch.tensor(int(number), device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def wait():
    """Until all ranks have come this far."""
    if RANKS > 1:
        dist.barrier()
