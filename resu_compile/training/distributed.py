"""Several processes that train one model: what they tell one another.

A rank is one process of ``torch.distributed``, mostly one GPU. Without a process group, or with a
group of one, each function here does nothing or gives back what it got. All others have to be
called on every rank, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resu_compile.errors import ArgumentError, ResuCompileError
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller

T = TypeVar("T")

# gradients that were averaged are equal to the bit; those of other batches differ by far more
GRADIENT_TOLERANCE = 1e-4


# -- ranks -------------------------------------------------------------------------------------
def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is, from 0 on."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is rank 0, which alone writes files."""
    return rank() == 0


# -- values ------------------------------------------------------------------------------------
def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """The value of rank 0."""
    if world_size() == 1:
        return value
    box = [value if is_first() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def on_first(action: Callable[[], T]) -> T:
    """What ``action()`` gives on rank 0, where alone it is called; the others wait for it.

    Raises:
        ResuCompileError: on the other ranks, if it failed on rank 0, which raises its own error.
    """
    if not is_first():
        result, failure = from_first((None, None))
        if failure is not None:
            raise ResuCompileError(f"rank 0 failed: {failure}")
        return result  # type: ignore[return-value]
    try:
        done = action()
    except Exception as error:
        from_first((None, f"{type(error).__name__}: {error}"))
        raise
    from_first((done, None))
    return done


def mean(value: Tensor) -> Tensor:
    """Mean of a floating-point tensor over all ranks, detached."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    dist.all_reduce(total)
    return total / world_size()


# -- the model ---------------------------------------------------------------------------------
def data_parallel_of(model: nn.Module) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` that ``model`` is, ``torch.compile`` around it or not.

    Raises:
        ArgumentError: it spans other ranks than all, or it was itself sparsified.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, DistributedDataParallel):
        return None
    size = dist.get_world_size(inner.process_group)
    if size != world_size():
        raise ArgumentError(
            f"model: expected a DistributedDataParallel over all {world_size()} ranks, got one "
            f"over a process group of {size}"
        )
    from resu_compile.runtime.controller import find_controller

    if find_controller(inner) is not None:
        raise ArgumentError(
            "model: expected the model inside DistributedDataParallel to be sparsified, but its "
            "wrapper was; call sparsify(model) before DistributedDataParallel(model), or leave "
            "both to Trainer or Cycle"
        )
    return inner


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside a ``DistributedDataParallel``; any other one as it is."""
    wrapper = data_parallel_of(model)
    if wrapper is None:
        return model
    inner: nn.Module = wrapper.module
    return inner


def check_gradients(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Check that gradients are those of all ranks' batches together, by their norm.

    Raises:
        ArgumentError: they differ, so that each rank would train a model of its own.
    """
    if world_size() == 1:
        return
    found = (parameter.grad for parameter in parameters)
    grads = [grad for grad in found if grad is not None and grad.layout is torch.strided]
    norms = gather(float(nn.utils.get_total_norm(grads)))
    if not all(map(math.isfinite, norms)):
        return  # an overflow in float16, or a loss that has its own error
    if max(norms) - min(norms) > GRADIENT_TOLERANCE * max(norms):
        shown = ", ".join(f"{norm:g}" for norm in norms)
        raise ArgumentError(
            "model: expected the same gradients on all ranks, got norms "
            f"{shown} at optimizer step {step}; give Trainer the DistributedDataParallel(model), "
            "or let loss_fn call it"
        )


# -- masks -------------------------------------------------------------------------------------
def masks_of_first(controller: Controller, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rank 0's choice, for all ranks; before the masks change.

    Weights and the random generator become those of rank 0 too: a calibrated method has written
    into the weights what its own data say, and may have drawn another number of times.

    Args:
        controller: of the model.
        masks: parameter name -> bool mask of the weight's shape, this rank's choice.
    """
    if world_size() == 1:
        return masks
    agreed = {}
    for name, weight in controller.weights.items():
        bits = pack_mask(masks[name].to(weight.bits.device))
        dist.broadcast(bits, src=0)
        agreed[name] = unpack_mask(bits, weight.shape)
    _take_weights(controller)
    controller.generator.set_state(from_first(controller.generator.get_state()))
    return agreed


def sync_masks(controller: Controller) -> None:
    """Make masks, phase, weights and random generator those of rank 0.

    And from now on, let all ranks take rank 0's masks whenever they change: at each ``prune`` and
    ``commit``, which all ranks then have to call. ``Cycle`` and ``Trainer`` do this by themselves.
    """
    controller.agree = masks_of_first
    if world_size() == 1:
        return
    state = from_first(controller.state_dict() if is_first() else {})
    if not is_first():
        controller.load_state_dict(state)
    _take_weights(controller)


def _take_weights(controller: Controller) -> None:
    with torch.no_grad():
        for weight in controller.weights.values():
            value = weight.parameter.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(value, src=0)
            weight.parameter.copy_(value)  # the version counter sees it
