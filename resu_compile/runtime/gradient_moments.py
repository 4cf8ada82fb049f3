"""Decaying mean squares of gradients, which the saliency of a weight is made of.

    F <- decay F + (1 - decay) g^2

at each optimizer step, in every phase. At a pruned place, which gets no gradient, F fades. That of
a place that begins to train grows from there, so that a newcomer has to prove itself: after n steps
of gradients of the same size F has come up to ``1 - decay^n`` of their square.

Means of squares that an optimizer keeps would save the memory, but not every optimizer has them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError, check_share
from resu_compile.methods import GradientMethod

DECAY = 0.99


@dataclass
class _OpenStep:
    """A step() of a weight that has not returned yet, and those within it."""

    grad: weakref.ref[Tensor]
    backward_count: int
    depth: int = 1


def gradient_score(
    method: GradientMethod,
    moments: GradientMoments | None,
    name: str,
    value: Tensor,
    *,
    argument: str,
) -> Tensor:
    """The score of the weight ``name`` by ``method``.

    Args:
        method: scores by gradients.
        moments: what is known of them; None if nobody saw them.
        name: of the weight.
        value: of the weight.
        argument: that asked for the method, for the message.

    Raises:
        ArgumentError: nothing is known of them.
    """
    if moments is None:
        raise ArgumentError(
            f"{argument}: expected another one than {type(method).__name__} for weights whose "
            "gradients nobody saw; call controller(model).track_gradients() before training, or "
            "choose 'magnitude'"
        )
    return method.score_with(value, moments.mean_square(name, value.device))


class GradientMoments:
    """The mean square of each weight's gradient, in float32: one tensor of the weight's shape.

    Args:
        decay: of the mean, in [0, 1).
    """

    def __init__(self, decay: float = DECAY) -> None:
        self.decay = check_share(decay, name="decay")
        self._squares: dict[str, Tensor] = {}
        self._open: dict[str, _OpenStep] = {}

    def enter(self, name: str, grad: Tensor, backward_count: int) -> bool:
        """Whether ``grad`` is to be taken in: not if a step() around this one has done so.

        Args:
            name: of the weight.
            grad: its gradient.
            backward_count: how many gradients have arrived at the weight.
        """
        step = self._open.get(name)
        if step is None or step.grad() is not grad or step.backward_count != backward_count:
            self._open[name] = _OpenStep(weakref.ref(grad), backward_count)
            return True
        step.depth += 1
        return False

    def leave(self, name: str) -> None:
        """A step() of the weight ``name`` has returned."""
        step = self._open.get(name)
        if step is not None:
            step.depth -= 1
            if step.depth == 0:
                del self._open[name]

    def observe(self, grads: Sequence[tuple[str, Tensor]], factor: float = 1.0) -> None:
        """Take in the gradients of one optimizer step.

        Args:
            grads: names of weights and their gradients, of any dtype.
            factor: what they are multiplied with, to undo the scale of a loss.
        """
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        share = (1.0 - self.decay) * factor**2
        with torch.no_grad(), torch.inference_mode(False):
            for name, grad in grads:
                value = grad.detach().to_dense() if grad.is_sparse else grad.detach()
                square = self._square(name, value)
                if value.dtype is torch.float32:
                    squares, values = by_device.setdefault(value.device, ([], []))
                    squares.append(square)
                    values.append(value)
                else:  # one wide copy at a time
                    wide = value.float()
                    square.mul_(self.decay).addcmul_(wide, wide, value=share)
            for squares, values in by_device.values():
                torch._foreach_mul_(squares, self.decay)
                torch._foreach_addcmul_(squares, values, values, share)

    def _square(self, name: str, like: Tensor) -> Tensor:
        known = self._squares.get(name)
        if known is None:
            known = torch.zeros_like(like, dtype=torch.float32)
        self._squares[name] = known = known.to(like.device)
        return known

    def mean_square(self, name: str, device: torch.device) -> Tensor:
        """F of the weight ``name``: float32, its shape; not to be written into.

        Raises:
            ArgumentError: no optimizer has stepped the weight since it is looked at.
        """
        if name not in self._squares:
            raise ArgumentError(
                f"saliency: expected a gradient of {name} to be known, but no optimizer has "
                "stepped it since controller(model).track_gradients(); train some steps first, or "
                "choose 'magnitude'"
            )
        return self._squares[name].to(device)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors; copies."""
        return {
            "decay": self.decay,
            "squares": {name: value.clone() for name, value in self._squares.items()},
        }

    @classmethod
    def from_state_dict(cls, data: Mapping[str, Any]) -> GradientMoments:
        """What ``state_dict`` described; tensors are copied."""
        made = cls(data["decay"])
        made._squares = {name: value.clone() for name, value in data["squares"].items()}
        return made
