"""What is kept from a weight's optimizer while it steps: theta, or the active places.

Used where the optimizer knows nothing of masks; ``resu_compile.optim`` needs none of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resu_compile.kernels.effective_weight import route_gradient
from resu_compile.kernels.mask_bits import zero_where_
from resu_compile.runtime.optimizer_state import same_shaped_state, zero_state
from resu_compile.runtime.theta import theta_slot
from resu_compile.state import MaskedWeight


class SetAside:
    """What is hidden of one weight while the user's optimizer steps."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, weight: MaskedWeight, parameter: nn.Parameter
    ) -> None:
        self.depth = 1
        self.backward_count = weight.backward_count
        self._optimizer = optimizer
        self._weight = weight
        self._parameter = parameter
        self._gradient = parameter.grad
        self._stand_in = parameter.grad
        self._aside: list[tuple[str | None, Tensor]] = []
        self._active: Tensor | None = None
        self._active_state: list[tuple[torch.optim.Optimizer, dict[str, Tensor]]] = []

    def hide_gradient(self) -> None:
        """Without a gradient every optimizer leaves the weight alone, weight decay included."""
        self._stand_in = self._parameter.grad = None

    def set_theta_aside(self, names: tuple[str, ...]) -> None:
        """With 0 in the pruned places the optimizer's momentum and decay cannot reach theta.

        Args:
            names: of the state tensors in whose pruned places theta's means live.
        """
        bits, parameter = self._weight.bits, self._parameter
        with torch.no_grad():
            slots = {name: theta_slot(self._optimizer, parameter, name) for name in names}
            for name, tensor in [(None, parameter.detach()), *slots.items()]:
                if tensor is not None:
                    self._aside.append((name, self._weight.gather(tensor, False)))
                    zero_where_(tensor, bits, True)
            assert parameter.grad is not None
            self._stand_in = parameter.grad = route_gradient(parameter.grad, bits, True)

    def keep_active(self) -> None:
        """Copy the weight and its state, to put the active part back after the step."""
        self._active = self._parameter.detach().clone()
        self._keep_state(self._optimizer)

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that the step() calls that of ``optimizer``, for which the same is hidden."""
        self.depth += 1
        known = any(optimizer is one for one, _ in self._active_state)  # one that raised, again
        if self._active is not None and not known:
            self._keep_state(optimizer)

    def _keep_state(self, optimizer: torch.optim.Optimizer) -> None:
        state = same_shaped_state(optimizer, self._parameter)
        kept = {key: value.detach().clone() for key, value in state}
        self._active_state.append((optimizer, kept))

    def restore_gradient(self) -> None:
        """Give the parameter back the gradient that the optimizer did not see."""
        if self._parameter.grad is self._stand_in:
            self._parameter.grad = self._gradient

    def restore_weight(self) -> None:
        """Put theta back, or the active weights and their state."""
        bits, parameter = self._weight.bits, self._parameter
        with torch.no_grad():
            if self._aside:
                zero_state(self._optimizer, parameter, bits, keep=True)
            for name, values in self._aside:
                place = theta_slot(self._optimizer, parameter, name) if name else parameter
                if place is not None:
                    self._weight.scatter_(place, values, False)
            if self._active is None:
                return
            mask = self._weight.mask
            parameter.copy_(torch.where(mask, self._active, parameter))
            for optimizer, kept in self._active_state:
                for key, value in same_shaped_state(optimizer, parameter):
                    if key in kept:
                        value.copy_(torch.where(mask, kept[key], value))
                    else:  # made in this step: untouched means zero
                        zero_where_(value, bits.to(value.device), False)
