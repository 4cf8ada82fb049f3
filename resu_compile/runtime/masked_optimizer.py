"""What the optimizers of ``resu_compile.optim`` share: a step that knows masks.

They are torch's own optimizers but for one thing: of a masked weight whose phase asks for it,
active places and theta move in one pass over memory (kernels/fused_update.py), before torch's step,
from which runtime/optimizer_hooks.py then hides their gradients. All other parameters take torch's
path, fused or foreach as the user chose.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.errors import ArgumentError
from resu_compile.kernels.fused_update import STAY, Step, packed_adam
from resu_compile.phase import Phase
from resu_compile.runtime.optimizer_state import is_packed
from resu_compile.runtime.resurrection import factor_of, skipped_by_scaler
from resu_compile.runtime.rules import EMAS
from resu_compile.state import MaskedWeight

Entry = tuple[dict[str, Any], nn.Parameter, MaskedWeight]


class MaskedOptimizer(torch.optim.Optimizer):
    """Mixin before one of torch's optimizers.

    Attributes:
        packs_state: whether the SPARSE phase keeps state for the active places only.
    """

    packs_state = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "packs_state": self.packs_state}

    # -- what differs between optimizers -------------------------------------------------------
    @abstractmethod
    def _active_step(self, group: dict[str, Any], parameter: nn.Parameter) -> Step:
        """The step that torch's optimizer would take now; makes the state and counts the step."""

    @abstractmethod
    def _can_take_over(self, group: dict[str, Any]) -> bool:
        """Whether the settings of ``group`` are among those that the fused step knows."""

    # -- who steps what ------------------------------------------------------------------------
    def takes_over(
        self, group: dict[str, Any], parameter: nn.Parameter, weight: MaskedWeight
    ) -> bool:
        """Whether this optimizer steps ``parameter`` itself instead of leaving it to torch's."""
        grad = parameter.grad
        if grad is None or grad.is_sparse or parameter.dtype == torch.float16:
            return False
        if not parameter.is_floating_point() or not self._can_take_over(group):
            return False
        controller = weight.controller
        if controller.phase is Phase.SPARSE:
            return self.packs_state
        if controller.phase is not Phase.RESU or controller.resurrection is None:
            return False
        return controller.resurrection.has_own_rule or controller.resurrection.config.freeze_active

    def step_masked(self, entries: Iterable[Entry]) -> None:
        """Step the masked weights of ``entries``, of which ``takes_over`` is true.

        Args:
            entries: parameter group, parameter and masked weight; group by group.
        """
        if skipped_by_scaler(self):
            return
        for _, same_group in groupby(entries, key=lambda entry: id(entry[0])):
            factor = None
            for group, parameter, weight in same_group:
                factor = factor_of(self, group) if factor is None else factor
                self._step_one(group, parameter, weight, factor)

    def _step_one(
        self, group: dict[str, Any], parameter: nn.Parameter, weight: MaskedWeight, factor: float
    ) -> None:
        resurrection = weight.controller.resurrection
        if resurrection is not None:
            self.unpack_state(parameter, weight)
            moves = not resurrection.config.freeze_active or (
                weight.nnz < weight.numel and not resurrection.has_own_rule
            )
            step = self._active_step(group, parameter) if moves else STAY
            theta = resurrection.theta_of(weight)
            theta.move(self, group, weight, parameter, step, factor)
            return
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        self.pack_state(parameter, weight)
        for name in EMAS:
            if name not in state:
                state[name] = torch.zeros(
                    weight.nnz, dtype=parameter.dtype, device=parameter.device
                )
            _check_packed(name, state[name], weight)
        step = self._active_step(group, parameter)
        packed_adam(
            parameter.detach(),
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            weight.bits,
            weight.ranks(True),
            step,
            factor,
        )

    # -- packed state ----------------------------------------------------------------------------
    def pack_state(self, parameter: nn.Parameter, weight: MaskedWeight) -> None:
        """Keep the moments of the active places only; the others are dropped."""
        state = self.state.get(parameter, {})
        for name in EMAS:
            value = state.get(name)
            if value is not None and value.shape == parameter.shape != (weight.nnz,):
                state[name] = weight.gather(value, True)

    def unpack_state(self, parameter: nn.Parameter, weight: MaskedWeight) -> None:
        """Give the moments the parameter's shape again, 0 at the pruned places.

        Raises:
            ArgumentError: they are those of another mask.
        """
        state = self.state.get(parameter, {})
        for name in EMAS:
            value = state.get(name)
            if isinstance(value, Tensor) and is_packed(value, parameter):
                _check_packed(name, value, weight)
                full = torch.zeros_like(parameter, dtype=value.dtype)
                with torch.no_grad():
                    weight.scatter_(full, value, True)
                state[name] = full

    # -- the step count ----------------------------------------------------------------------------
    def _count_step(self, parameter: nn.Parameter) -> int:
        """Add 1 to the step count and return it; waits for the device at a new count only."""
        counter: Tensor = self.state[parameter]["step"]
        if counter.device.type == "cpu":
            counter += 1
            return int(counter.item())
        known: dict[Tensor, tuple[Tensor, int, int]] = self.__dict__.setdefault("_counts", {})
        held, version, count = known.get(parameter, (None, 0, 0))
        if held is not counter or version != counter._version:  # loaded, or written by torch
            count = int(counter.item())
        counter += 1
        known[parameter] = (counter, counter._version, count + 1)
        return count + 1


def _check_packed(name: str, value: Tensor, weight: MaskedWeight) -> None:
    if value.shape != (weight.nnz,):
        raise ArgumentError(
            f"{name} of {weight.name}: expected shape ({weight.nnz},), one number an active place, "
            f"got {tuple(value.shape)}; packed moments load only beside the masks that they were "
            "saved with, controller(model).load_state_dict(...) brings them back"
        )
