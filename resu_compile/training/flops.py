"""What training and inference cost, counted as the tables of RigL count it.

    forward                  f_S = sum_i d_i F_i + other    d_i density, F_i FLOPs of weight i
    backward                 2 f_S; of the gradients of weights, as much as is computed:
    step                     3 f_S
    step, dense gradient     2 f_S + f_D
    dense step               3 f_D

``other`` is what no masked weight has a part in: heads, attention products, layers left dense.
Sparse products count by their non-zeros, whether a kernel makes use of them or not.

Source: Evci et al. 2020, appendix H, https://arxiv.org/abs/1911.11134
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from resu_compile.errors import ArgumentError
from resu_compile.phase import Phase, Routing
from resu_compile.runtime.controller import Controller, find_controller


# -- of a model --------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one dense forward pass.

    Attributes:
        weights: name of a masked weight -> FLOPs of the products with it.
        other: FLOPs of everything else.
    """

    weights: Mapping[str, float]
    other: float

    @property
    def dense(self) -> float:
        """FLOPs of the whole."""
        return sum(self.weights.values()) + self.other


class _Counter(TorchDispatchMode):
    """Adds the FLOPs of each op to the weight that shares its memory with one of the operands."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self.weights = dict.fromkeys(owners.values(), 0.0)
        self.other = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            return out
        flops = float(count(*args, **(kwargs or {}), out_val=out))
        found = [self._owner(value) for value in args if isinstance(value, Tensor)]
        owner = next((name for name in found if name is not None), None)
        if owner is None:
            self.other += flops
        else:
            self.weights[owner] += flops
        return out

    def _owner(self, value: Tensor) -> str | None:
        return self._owners.get(value.untyped_storage().data_ptr())


@contextmanager
def _plain_products() -> Iterator[None]:
    """Attention and recurrent layers as the matrix products that they are, which are counted.

    torch knows no FLOPs of its fused ones on the CPU, of those of cuDNN, and of the fast path of
    transformer layers.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    fused = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns of GPUs
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)


def count_flops(model: nn.Module, *inputs: Any, **kwargs: Any) -> ModelFlops:
    """FLOPs of one call of ``model``, which runs eagerly, in eval mode and without gradients.

    A product belongs to the weight whose memory it reads, through views too. A weight that is first
    copied or cast (``torch.autocast``) is not recognised, so call it in the dtype of the weights.

    Args:
        model: with a controller.
        *inputs: positional inputs of the call; FLOPs are those of this batch.
        **kwargs: keyword inputs of the call.

    Raises:
        ArgumentError: ``model`` has no controller.
    """
    controller = find_controller(model)
    if controller is None:
        raise ArgumentError("model: expected one with a controller, got a plain one; sparsify it")
    owners = {
        weight.parameter.untyped_storage().data_ptr(): name
        for name, weight in controller.weights.items()
    }
    training = [module for module in model.modules() if module.training]
    model.eval()
    counter = _Counter(owners)
    try:
        with _plain_products(), counter:
            model(*inputs, **kwargs)
    finally:
        for module in training:  # each by itself: a frozen norm stays in eval mode
            module.training = True
    return ModelFlops(counter.weights, counter.other)


# -- of a run ----------------------------------------------------------------------------------
class StepCosts:
    """Sums over the steps of the density that each weight was multiplied with.

    Attributes:
        steps: how many were counted.
        forward: weight name -> sum of its densities in the forward pass, and in the gradient of its
            input.
        gradient: weight name -> sum of the shares of its own gradient that were computed.
        entries: weight name -> number of its entries.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.forward: dict[str, float] = {}
        self.gradient: dict[str, float] = {}
        self.entries: dict[str, int] = {}
        self._next: dict[str, tuple[float, float]] = {}
        self._key: tuple[int, int, bool] | None = None

    def prepare(
        self, controller: Controller, gradient_shares: Mapping[str, float] | None = None
    ) -> None:
        """Note what the next step will cost.

        Args:
            controller: as it is for that step.
            gradient_shares: share of each weight's gradient that the method asks for; None goes by
                the controller.
        """
        running = controller.resurrection
        choosing = running is not None and running.is_choosing
        key = (controller.epoch, id(gradient_shares), choosing)
        if key == self._key:
            return
        self._key = key
        sparse, dense = controller.phase is Phase.SPARSE, controller.routing is Routing.ALL
        extra = 0.0  # places of theta, as a share of the active ones
        if running is not None and running.config.places is not None:
            sparse, dense, extra = True, choosing, running.config.places
        elif running is not None and running.config.hidden:
            sparse, dense = True, True
        for name, weight in controller.weights.items():
            density = min((1.0 + extra) * weight.nnz / weight.numel, 1.0) if sparse else 1.0
            share = 1.0 if dense or not sparse else density
            if gradient_shares is not None:
                share = gradient_shares[name]
            self._next[name] = (density, share)
            self.entries[name] = weight.numel

    def count(self) -> None:
        """Count the step that was prepared."""
        self.steps += 1
        for name, (density, share) in self._next.items():
            self.forward[name] = self.forward.get(name, 0.0) + density
            self.gradient[name] = self.gradient.get(name, 0.0) + share

    def training_share(self, flops: ModelFlops | None = None) -> float:
        """Training FLOPs relative to training as many steps dense; 0 before the first step.

        Args:
            flops: of the model; None takes one product an entry and nothing else, which is right
                for matrices that all see the same number of rows.
        """
        weights = dict(self.entries) if flops is None else flops.weights
        other = 0.0 if flops is None else flops.other
        spent = 3.0 * other * self.steps + sum(
            cost * (2.0 * self.forward[name] + self.gradient[name])
            for name, cost in weights.items()
            if name in self.forward
        )
        dense = 3.0 * self.steps * (other + sum(weights.values()))
        return spent / dense if dense else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "steps": self.steps,
            "forward": dict(self.forward),
            "gradient": dict(self.gradient),
            "entries": dict(self.entries),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.steps = state["steps"]
        self.forward, self.gradient = dict(state["forward"]), dict(state["gradient"])
        self.entries = dict(state["entries"])
        self._key = None


def inference_share(controller: Controller, flops: ModelFlops | None = None) -> float:
    """FLOPs of a forward pass with the present masks, relative to a dense one.

    Args:
        controller: of the model.
        flops: as in ``StepCosts.training_share``.
    """
    weights = controller.weights
    density = {name: weight.nnz / weight.numel for name, weight in weights.items()}
    cost = {n: float(w.numel) for n, w in weights.items()} if flops is None else flops.weights
    other = 0.0 if flops is None else flops.other
    dense = other + sum(cost.values())
    return (other + sum(cost[name] * density[name] for name in density)) / dense if dense else 0.0
