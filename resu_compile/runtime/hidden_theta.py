"""Theta that forward passes do not see.

    forward, backward     w holds 0 at the pruned places; the gradient reaches them all the same
    show()                w holds theta there            (optimizer step, commit)
    hide()                what w holds there is theta; w holds 0 again

Theta then moves by the gradient at the sparse point, straight through the mask: trying a place
changes nothing for the network that is to be shipped. It costs one copy of each masked weight.

Source of the straight-through gradient: Bengio et al. 2013, https://arxiv.org/abs/1308.3432
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resu_compile.kernels.mask_bits import take_pruned_
from resu_compile.state import MaskedWeight


@dataclass
class _Aside:
    """Theta of one weight, in the weight's shape and 0 at the active places.

    Attributes:
        value: theta as of the last ``hide``.
        depth: how many ``step()`` calls, one inside the other, the weight shows it to.
        backward_count: that of the weight when it was shown.
    """

    value: Tensor
    depth: int = 0
    backward_count: int = 0


class HiddenTheta:
    """Theta of all weights of one resurrection.

    Args:
        values: weight name -> theta, shape of the weight, 0 at its active places.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self._aside = {name: _Aside(value) for name, value in (values or {}).items()}

    def begin(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        """Take the first theta out of the pruned places of ``parameter``."""
        with torch.inference_mode(False):  # steps write it outside
            self._aside[weight.name] = _Aside(torch.zeros_like(parameter.detach()))
        self._take(weight, parameter)

    def is_shown(self, weight: MaskedWeight) -> bool:
        """Whether a ``step()`` that sees theta has not ended."""
        aside = self._aside[weight.name]
        return aside.depth > 0 and aside.backward_count == weight.backward_count

    def show(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        """Put theta into the pruned places of ``parameter``, if no ``show`` has done so."""
        aside = self._aside[weight.name]
        if self.is_shown(weight):
            aside.depth += 1
            return
        self.recover(weight, parameter)
        aside.depth, aside.backward_count = 1, weight.backward_count
        self._follow(weight.name, parameter)
        weight.enforce_zeros(parameter)
        with torch.no_grad():
            parameter.add_(aside.value)

    def _follow(self, name: str, parameter: nn.Parameter) -> None:
        """Follow a model that was moved or cast."""
        aside = self._aside[name]
        if aside.value.device != parameter.device or aside.value.dtype != parameter.dtype:
            aside.value = aside.value.to(device=parameter.device, dtype=parameter.dtype)

    def hide(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        """Take theta out of ``parameter`` again, at the end of the outermost ``step()``."""
        aside = self._aside[weight.name]
        if aside.depth > 0:
            aside.depth -= 1
            if aside.depth == 0:
                self._take(weight, parameter)

    def _take(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        self._follow(weight.name, parameter)
        with torch.no_grad():
            take_pruned_(parameter, weight.bits, self._aside[weight.name].value)
        weight.trust_value(parameter)

    def recover(self, weight: MaskedWeight, parameter: nn.Parameter) -> None:
        """Hide theta as it stands, where a ``step()`` has raised or runs a model itself."""
        aside = self._aside[weight.name]
        if aside.depth > 0:
            aside.depth = 0
            self._take(weight, parameter)

    def settle(self, weight: MaskedWeight, before: Tensor) -> None:
        """Go on under a new mask: what stays pruned keeps theta, all else has 0.

        A calibrated method has written zeros where the weight showed theta.

        Args:
            weight: with its new mask; its parameter shows theta.
            before: bool, the mask before.
        """
        aside = self._aside[weight.name]
        aside.depth = 0
        with torch.no_grad():
            aside.value.masked_fill_((before | weight.mask).to(aside.value.device), 0)
        weight.enforce_zeros(weight.parameter)

    def values(self) -> dict[str, Tensor]:
        """Weight name -> theta; copies."""
        return {name: aside.value.clone() for name, aside in self._aside.items()}
