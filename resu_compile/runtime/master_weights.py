"""Weights that keep their values at pruned places, where the forward pass sees zeros.

    hide(masks)    W -> kept aside;  the model holds M * W        (forward, backward)
    show()         the model holds W again, in the DENSE phase    (optimizer step)
    take(places)   W is what the model holds at ``places``, and what it was elsewhere

    lend(places)   show() for one optimizer step, which may change W at ``places``
    take_back()    take() of what was lent
    conceal()      take_back() and hide()

Methods need this whose pruned weights go on training (SR-STE), rest (Top-KAST) or may return with
the value that they had (gradual magnitude pruning). It costs one copy of each masked weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from resu_compile.kernels.mask_bits import pack_mask
from resu_compile.phase import Phase
from resu_compile.runtime import optimizer_hooks
from resu_compile.runtime.controller import Controller
from resu_compile.runtime.masked_optimizer import MaskedOptimizer
from resu_compile.runtime.optimizer_state import zero_state


class MasterWeights:
    """The full values of a controller's weights.

    Args:
        controller: in the DENSE or SPARSE phase; its weights as they are now are the first values.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._values = {
            name: weight.parameter.detach().clone() for name, weight in controller.weights.items()
        }
        self._lent = False
        self._lent_places: Mapping[str, Tensor] | None = None

    def value(self, name: str) -> Tensor:
        """The full value of the weight ``name``, as of the last ``take``."""
        held = self._values[name]
        device = self._controller.weights[name].parameter.device
        if held.device != device:
            held = self._values[name] = held.to(device)
        return held

    def take(self, places: Mapping[str, Tensor] | None = None) -> None:
        """Take over what the model holds.

        Args:
            places: weight name -> bool mask of where; None is everywhere.
        """
        with torch.no_grad():
            for name, weight in self._controller.weights.items():
                held, value = self.value(name), weight.parameter.detach()
                if places is None:
                    held.copy_(value)
                else:
                    torch.where(places[name].to(held.device), value, held, out=held)

    def show(self) -> None:
        """Put the full values into the model; the phase is DENSE, so that all of them may move."""
        controller = self._controller
        with torch.no_grad():
            for name, weight in controller.weights.items():
                self._unpack(weight)
                weight.parameter.copy_(self.value(name))
                weight.distrust_value()
        controller._phase = Phase.DENSE
        controller.epoch += 1

    def hide(self, masks: Mapping[str, Tensor] | None = None) -> None:
        """Put the values at active places into the model, and 0 elsewhere; the phase is SPARSE.

        Optimizer state stays as it is, also at pruned places.

        Args:
            masks: weight name -> bool mask; None keeps those that are.
        """
        controller = self._controller
        changed = False
        for name, weight in controller.weights.items():
            if masks is not None:
                before = weight.nnz
                controller.history.record(weight)
                weight.set_mask(masks[name])
                controller.history.record(weight)
                changed = changed or weight.nnz != before
            with torch.no_grad():
                weight.parameter.copy_(self.value(name))
            weight.distrust_value()
            weight.enforce_zeros(weight.parameter)
        controller.structure += changed
        controller._phase = Phase.SPARSE
        controller.epoch += 1

    # -- one optimizer step ----------------------------------------------------------------------
    def lend(self, places: Mapping[str, Tensor] | None = None) -> None:
        """Show the full values until ``take_back``.

        Args:
            places: weight name -> bool mask of where they may change; None is everywhere.
        """
        self.show()
        self._lent, self._lent_places = True, places

    def take_back(self) -> None:
        """Take over what became of the values that were lent; nothing if none were."""
        if self._lent:
            self.take(self._lent_places)
            self._lent, self._lent_places = False, None

    def conceal(self) -> None:
        """Let forward passes see zeros at pruned places again, if values are lent."""
        if self._lent:
            self.take_back()
            self.hide()

    def zero_state(self, places: Mapping[str, Tensor]) -> None:
        """Optimizer state is 0 outside of ``places`` from here on.

        Args:
            places: weight name -> bool mask.
        """
        for name, weight in self._controller.weights.items():
            bits = pack_mask(places[name].to(weight.bits.device))
            for optimizer in optimizer_hooks.optimizers_of(weight):
                zero_state(optimizer, weight.parameter, bits, keep=True)

    def _unpack(self, weight: Any) -> None:
        for optimizer in optimizer_hooks.optimizers_of(weight):
            if isinstance(optimizer, MaskedOptimizer):
                optimizer.unpack_state(weight.parameter, weight)

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Tensor]:
        """Weight name -> full value; copies."""
        return {name: value.clone() for name, value in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave; the model's own weights are loaded elsewhere."""
        with torch.no_grad():
            for name in self._values:
                self.value(name).copy_(state[name])
