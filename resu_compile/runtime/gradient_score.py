"""The gradients that a commit with ``score="gradient"`` goes by.

They are gone when it is time to commit: ``zero_grad()`` drops them, and a later backward pass of
the same step would add to them. So |g| is copied at each optimizer step: one read and one write of
the weight's size, and one tensor of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError


def all_finite(grads: Sequence[Tensor]) -> bool:
    """Whether no gradient holds NaN or infinity; waits for the device once."""
    if not grads:
        return True
    device = grads[0].device
    dense = (grad.coalesce().values() if grad.is_sparse else grad for grad in grads)
    checks = [torch.isfinite(grad).all().to(device) for grad in dense]
    return bool(torch.stack(checks).all())


class LastGradients:
    """|g| of the last optimizer step, per weight.

    It is one gradient and no mean: what the loop's own batch says about each place. Its scale
    (loss scaling, clipping) cancels, because places compete inside their own weight.
    """

    def __init__(self) -> None:
        self._magnitudes: dict[str, Tensor] = {}

    def observe(self, name: str, grad: Tensor) -> None:
        """Remember ``grad``, with which the weight ``name`` is stepped now."""
        with torch.no_grad(), torch.inference_mode(False):
            known = self._magnitudes.get(name)
            if known is None or known.device != grad.device or known.dtype != grad.dtype:
                self._magnitudes[name] = grad.detach().abs()
            else:
                torch.abs(grad.detach(), out=known)

    def magnitude(self, name: str, parameter: Tensor) -> Tensor:
        """|g| of ``parameter``: of its last step, or of the gradient that it still has.

        Raises:
            ArgumentError: neither is known.
        """
        known = self._magnitudes.get(name)
        if known is not None:
            return known.to(parameter.device)
        if parameter.grad is not None:
            return parameter.grad.detach().abs()
        raise ArgumentError(
            f"score: expected a gradient of {name} for score='gradient', but no optimizer has "
            "stepped it since resurrect(score='gradient') and its .grad is None; begin the "
            "resurrection with score='gradient' and take a step, or commit(score='magnitude')"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Weight name -> |g|; copies."""
        return {name: value.clone() for name, value in self._magnitudes.items()}

    @classmethod
    def from_state_dict(cls, data: Mapping[str, Tensor]) -> LastGradients:
        """What ``state_dict`` described; tensors are copied."""
        made = cls()
        made._magnitudes = {name: value.clone() for name, value in data.items()}
        return made
