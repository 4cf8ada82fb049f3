"""What the optimizers of ``resu_compile.optim`` share: a step that knows masks.

They are torch's own optimizers but for one thing: of a masked weight whose phase asks for it,
active places and theta move in one pass over memory (kernels/fused_update.py). All other parameters
take torch's path, fused or foreach as the user chose.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.kernels.bit_rank import gather_by_rank, scatter_by_rank_
from resu_compile.kernels.fused_update import STAY, Step, packed_adam
from resu_compile.phase import Phase
from resu_compile.runtime.optimizer_state import is_packed
from resu_compile.runtime.resurrection import factor_of, skipped_by_scaler
from resu_compile.state import MaskedWeight, masked_weight_of


class MaskedOptimizer(torch.optim.Optimizer):
    """Mixin before one of torch's optimizers.

    Attributes:
        packs_state: whether the SPARSE phase keeps state for the active places only.
    """

    packs_state = False

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

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Torch's own collecting of what it steps, without the weights that are stepped here."""
        own = []
        for parameter in group["params"]:
            weight = masked_weight_of(parameter)
            if weight is None:
                continue
            if self.takes_over(group, parameter, weight):
                own.append((parameter, weight, parameter.grad))
            elif self.packs_state:
                self.unpack_state(parameter, weight.bits)
        for parameter, _, _ in own:
            parameter.grad = None
        try:
            result = super()._init_group(group, *lists)  # type: ignore[misc]
        finally:
            for parameter, _, grad in own:
                parameter.grad = grad
        if own and not skipped_by_scaler(self):
            factor = factor_of(self, group)
            for parameter, weight, _ in own:
                self._step_masked(group, parameter, weight, factor)
        return result

    def _step_masked(
        self, group: dict[str, Any], parameter: nn.Parameter, weight: MaskedWeight, factor: float
    ) -> None:
        resurrection = weight.controller.resurrection
        if resurrection is not None:
            self.unpack_state(parameter, weight.bits)
            stays = resurrection.config.freeze_active and resurrection.has_own_rule
            step = STAY if stays else self._active_step(group, parameter)
            resurrection.move(self, group, weight, parameter, step, factor)
            return
        step = self._active_step(group, parameter)
        self.pack_state(parameter, weight.bits, weight.nnz)
        state = self.state[parameter]
        grad = parameter.grad
        assert grad is not None
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
    def pack_state(self, parameter: nn.Parameter, bits: Tensor, nnz: int) -> None:
        """Keep the moments of the active places only; the others are dropped."""
        state = self.state.get(parameter)
        if not state:
            return
        for name in ("exp_avg", "exp_avg_sq"):
            value = state.get(name)
            if value is None:
                state[name] = torch.zeros(nnz, dtype=parameter.dtype, device=parameter.device)
            elif value.shape == parameter.shape and value.dim() != 1:
                state[name] = gather_by_rank(value, bits, True, nnz)

    def unpack_state(self, parameter: nn.Parameter, bits: Tensor) -> None:
        """Give the moments the parameter's shape again, 0 at the pruned places."""
        state = self.state.get(parameter, {})
        for name in ("exp_avg", "exp_avg_sq"):
            value = state.get(name)
            if isinstance(value, Tensor) and is_packed(value, parameter):
                full = torch.zeros_like(parameter, dtype=value.dtype)
                scatter_by_rank_(full, value, bits, True)
                state[name] = full

    # -- the step count ----------------------------------------------------------------------------
    def _count_step(self, state: dict[str, Any]) -> int:
        """Add 1 to ``state["step"]`` and return it; waits for the device once a phase at most."""
        counter: Tensor = state["step"]
        known: dict[int, tuple[int, int]] = self.__dict__.setdefault("_step_cache", {})
        found = known.get(id(counter))
        if counter.device.type == "cpu" or found is None or found[0] != counter._version:
            count = int(counter.item()) + 1
        else:
            count = found[1] + 1
        counter += 1
        known[id(counter)] = (counter._version, count)
        return count
