"""A watch over the loss that names the step at which it went bad."""

from __future__ import annotations

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError, ArgumentTypeError


class LossWatch:
    """Remembers the first step whose loss was NaN or infinite.

    Args:
        delayed: keep the step on the device until ``check()``, because reading the loss of every
            step would make the host wait for every step; False raises at once. None delays unless
            the loss is on the CPU.
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
        delayed = loss.device.type != "cpu" if self._delayed is None else self._delayed
        if not delayed:
            if not bool(finite):
                _raise(step)
            return
        if self._bad is None:
            self._bad = torch.zeros((), dtype=torch.int64, device=loss.device)
        now = torch.where(finite, 0, step)
        self._bad = torch.where(self._bad == 0, now, self._bad)

    def check(self) -> None:
        """Raise the error if any loss was bad.

        Raises:
            ArgumentError: it names the first such step.
        """
        if self._bad is not None and (step := int(self._bad)):
            _raise(step)


def _raise(step: int) -> None:
    raise ArgumentError(
        f"loss_fn: expected a finite loss, got NaN or infinity at optimizer step {step}; lower the "
        "learning rate, set clip_norm, or look at that step's batch"
    )
