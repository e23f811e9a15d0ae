"""The same training step from parts of a batch: on several devices (torchrun), or one after the other (--accumulate).

    torchrun --nproc-per-node 2 train.py --task xnli          # 2 processes; gloo on CPU, NCCL on CUDA
    python train.py --task xnli --accumulate 2                # one process, half of the memory for activations

A batch of B rows is cut into N * K parts for N processes of K parts each; row i belongs to part i mod (N K). Losses are
means, and parts may differ in rows and tokens: each term of a part is multiplied by the part's share of what its mean is
over, so that the sum of all parts is the loss of the whole batch, and the sum of their gradients its gradient. NOTE:
differs where a batch is more than its rows: ranges of activations found per batch (--per-tensor with dynamic ranges) and
the gradient of learned activation ranges, which is scaled by the size of the part (lsq.py).

Every process holds the whole model and does the same updates. Rank 0 alone writes and prints. Dropout and quantization
noise differ between processes. Words that no process saw have no gradient: those that any saw are summed as a small
table.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kit import common
from kit.common import UserError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def start(device: str) -> None:
    """Join the processes that torchrun started, if it did. All but the first neither write nor print, except errors."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or not dist.is_available():
        return
    cuda, local = torch.cuda.is_available() and device != "cpu", int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"process {local} has no GPU: start {torch.cuda.device_count()} with --nproc-per-node")
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # others wait while rank 0 writes
    if rank() > 0:
        common.writes = False
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    if world_size() > 1:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End the process. Under torchrun at once: torch.distributed's threads sometimes abort while Python takes everything
    down ("terminate called without an active exception"), which would make a finished run a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)
    sys.exit(status)


def wait() -> None:
    """Until every process is here: what rank 0 has written can be read then."""
    if world_size() > 1:
        dist.barrier()


def mine(items: Iterable) -> Iterator:
    """Every N-th item, from the rank's on."""
    return islice(items, rank(), None, world_size())


def gather(own: list) -> list:
    """The inverse of mine: all processes' lists in one, the first of each by rank, then the second, and so on."""
    if world_size() == 1:
        return own
    found = [own] * world_size()
    dist.all_gather_object(found, own)
    return [each[i] for i in range(max(map(len, found))) for each in found if i < len(each)]


def anywhere(flag: bool) -> bool:
    """Whether any process says so: all of them must save, or stop, at the same step."""
    if world_size() == 1:
        return flag
    total = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return bool(total)


def same(model: nn.Module) -> None:
    """Give all processes the tensors of rank 0's model: what each has computed by itself may differ in the last bits."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


# --------------------------------------------------------------------------- a step in several parts
def backward(
    model: nn.Module, loss: Callable[[Any], dict[str, Tensor]], batch: Any, count: int, over: dict[str, str]
) -> dict[str, Tensor]:
    """Add the gradients of a loss to model's parameters, summed over the parts of a batch and over all processes. Returns
    the terms of the loss of the whole batch, detached.

    loss: a part of the batch -> terms by name, whose sum is the loss.  count: of parts in each process.  over: what
    each term is a mean over, a key of batch.sizes(); tokens if it is not there.
    """
    found: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    for part, shares in parts(batch, count):  # usually the whole batch; cut before it is moved: a GPU's host would wait
        terms = loss(part.to(device))
        if shares:
            terms = {name: term * shares[over.get(name, "tokens")] for name, term in terms.items()}
        sum(terms.values()).backward()
        found = {name: found.get(name, 0) + term.detach() for name, term in terms.items()}
    if world_size() == 1:
        return found
    sum_gradients(model, batch.ids.to(device))
    total = torch.stack(list(found.values()))
    dist.all_reduce(total)
    return dict(zip(found, total, strict=True))


def parts(batch: Any, count: int) -> Iterator[tuple[Any, dict[str, float]]]:
    """This process's `count` parts of a batch, each with its shares of the means that losses are; {}: all of them."""
    of = world_size() * count
    if of == 1:
        yield batch, {}
        return
    whole = batch.sizes()
    for i in range(rank() * count, rank() * count + count):
        if i < len(batch.ids):
            part = batch.rows(slice(i, None, of))
            yield part, {kind: size / max(whole[kind], 1) for kind, size in part.sizes().items()}
        elif i == rank() * count:  # too few rows: one that counts nothing, so that gradients exist
            yield batch.rows(slice(0, 1)), dict.fromkeys(whole, 0.0)


def sum_gradients(model: nn.Module, ids: Tensor) -> None:
    """Add the gradients of all processes, in place.  ids: of the whole batch, whose words have gradients."""
    used = [parameter for parameter in model.parameters() if parameter.grad is not None]
    for parameter in used:
        if parameter.grad.is_sparse:
            words, own = torch.unique(ids), parameter.grad.coalesce()  # sorted, as own's indices are
            values = torch.zeros(len(words), parameter.shape[1], device=words.device, dtype=own.dtype)
            values[torch.searchsorted(words, own.indices()[0])] = own.values()
            dist.all_reduce(values)
            known = dict(is_coalesced=True, check_invariants=False)
            parameter.grad = torch.sparse_coo_tensor(words[None], values, parameter.shape, **known)
    dense = [parameter.grad for parameter in used if not parameter.grad.is_sparse]
    flat = torch.cat([gradient.reshape(-1) for gradient in dense])
    dist.all_reduce(flat)
    for gradient, total in zip(dense, flat.split([gradient.numel() for gradient in dense]), strict=True):
        gradient.copy_(total.view_as(gradient))
