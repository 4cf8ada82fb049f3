"""A watch over the loss that names the step at which it went bad."""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.training.distributed import gather, world_size


class LossWatch:
    """Remembers the first step whose loss was NaN or infinite.

    Args:
        delayed: keep the step on the device until ``check()``, because reading the loss of every
            step would make the host wait for every step; False raises at once. None delays unless
            the loss is on the CPU and of a single process: a rank that raised alone would leave
            the others waiting for its gradients.
    """

    def __init__(self, delayed: bool | None = None) -> None:
        self._delayed = delayed
        self._bad: Tensor | None = None

    def see(self, loss: object, step: int) -> None:
        """Look at one loss.

        Args:
            loss: what the loss function returned; a floating-point tensor with one element.
            step: the optimizer step, counted from 1.
        """
        if not isinstance(loss, Tensor):
            raise ArgumentTypeError(
                f"loss_fn: expected a scalar tensor, got a {type(loss).__name__}"
            )
        if loss.numel() != 1 or not loss.is_floating_point():
            raise ArgumentError(
                f"loss_fn: expected a floating-point scalar tensor, got {loss.dtype} of shape "
                f"{tuple(loss.shape)}; take the mean"
            )
        finite = torch.isfinite(loss.detach()).reshape(())
        delayed = self._delayed
        if delayed is None:
            delayed = loss.device.type != "cpu" or world_size() > 1
        if not delayed:
            if not bool(finite):
                _raise(step, [])
            return
        if self._bad is None:
            self._bad = torch.zeros((), dtype=torch.int64, device=loss.device)
        now = torch.where(finite, 0, step)
        self._bad = torch.where(self._bad == 0, now, self._bad)

    def check(self) -> None:
        """Raise the error if any loss was bad, on whatever rank.

        Raises:
            ArgumentError: it names the first such step, and the ranks.
        """
        steps = gather(0 if self._bad is None else int(self._bad))
        first = min(filter(None, steps), default=0)
        if first:
            ranks = [rank for rank, step in enumerate(steps) if step == first]
            _raise(first, ranks if len(steps) > 1 else [])


def _raise(step: int, ranks: list[int]) -> None:
    where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
    raise ArgumentError(
        f"loss_fn: expected a finite loss, got NaN or infinity at optimizer step {step}{where}; "
        "lower the learning rate, set clip_norm, or look at that step's batch"
    )
