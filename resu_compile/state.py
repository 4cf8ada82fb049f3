"""One masked weight: its packed mask, and what is known of its value and its gradient.

The masks live beside the model, in the controller, and never in the module: the class, the
parameter names and the ``state_dict()`` keys stay the model's own.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from resu_compile.errors import WeightError
from resu_compile.kernels.effective_weight import route_gradient
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask, zero_where_
from resu_compile.phase import Routing

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller

_REGISTRY: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_registry_epoch = 0


def masked_weight_of(parameter: Tensor) -> MaskedWeight | None:
    """The masked weight that ``parameter`` is, or None."""
    found: MaskedWeight | None = _REGISTRY.get(parameter)
    return found


def registry_epoch() -> int:
    """A number that grows whenever a parameter is registered or forgotten."""
    return _registry_epoch


class MaskedWeight:
    """A parameter with a mask.

    Attributes:
        name: first name of the parameter in its model.
        bits: uint8, the packed mask (kernels/mask_bits.py), on the parameter's device.
        nnz: number of active entries.
        mask_version: grows with every change of the mask.
    """

    def __init__(
        self,
        name: str,
        owner: nn.Module,
        attribute: str,
        mask: Tensor,
        controller: Controller,
    ) -> None:
        self.name = name
        self.attribute = attribute
        self.shape = mask.shape
        self.bits = pack_mask(mask)
        self.nnz = int(mask.sum())
        self.mask_version = 0
        self._owner = weakref.ref(owner)
        self._controller = weakref.ref(controller)
        self._parameter: weakref.ref[nn.Parameter] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._clean_value_version = -1
        self._graph_gradient: tuple[int, int, int, Routing] | None = None
        self._clean_gradient: tuple[weakref.ref[Tensor], int, Routing] | None = None
        self.bind()

    # -- the parameter -----------------------------------------------------------------------
    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        found = self._owner()
        if found is None:
            raise WeightError(f"{self.name}: expected its module to be alive, it is gone")
        return found

    @property
    def controller(self) -> Controller:
        """The controller that this weight belongs to."""
        found = self._controller()
        assert found is not None, "a masked weight outlived its controller"
        return found

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model holds it now; its masks and hooks follow it."""
        owner = self._owner()
        current = None if owner is None else owner._parameters.get(self.attribute)
        if current is None:
            raise WeightError(
                f"{self.name}: expected the model to still hold this parameter, found none; "
                "call controller(model).release() before removing a masked parameter"
            )
        if self._parameter is None or current is not self._parameter():
            self.bind()
        return current

    def bind(self) -> None:
        """Attach to the parameter that the owner holds now (``to_empty`` and swaps make new ones).

        Raises:
            WeightError: if the new parameter has another shape.
        """
        global _registry_epoch
        owner = self._owner()
        parameter = None if owner is None else owner._parameters.get(self.attribute)
        if parameter is None:
            return
        if parameter.shape != self.shape:
            raise WeightError(
                f"{self.name}: expected shape {tuple(self.shape)} of its mask, the parameter is "
                f"now {tuple(parameter.shape)}; release() the controller and sparsify again"
            )
        self.unbind()
        self._parameter = weakref.ref(parameter)
        _REGISTRY[parameter] = self
        _registry_epoch += 1
        self._clean_value_version = -1
        self._attach_hooks(parameter)

    def unbind(self) -> None:
        """Forget the parameter and take the hooks off it."""
        global _registry_epoch
        for handle in self._handles:
            handle.remove()
        self._handles = []
        old = None if self._parameter is None else self._parameter()
        if old is not None:
            _REGISTRY.pop(old, None)
            _registry_epoch += 1
        self._parameter = None

    def _attach_hooks(self, parameter: nn.Parameter) -> None:
        if parameter.requires_grad:
            self._handles = [
                parameter.register_hook(self._mask_gradient),
                parameter.register_post_accumulate_grad_hook(self._note_accumulated),
            ]

    def follow(self, parameter: nn.Parameter) -> None:
        """Catch up with what may have happened to the parameter since the last call."""
        if parameter.requires_grad and not self._handles:
            self._attach_hooks(parameter)
        if self.bits.device != parameter.device and parameter.device.type != "meta":
            self.bits = self.bits.to(parameter.device)

    # -- the mask ----------------------------------------------------------------------------
    @property
    def numel(self) -> int:
        """Number of entries, active and pruned."""
        return self.shape.numel()

    @property
    def sparsity(self) -> float:
        """Share of pruned entries."""
        return 1.0 - self.nnz / self.numel

    @property
    def mask(self) -> Tensor:
        """bool, shape of the weight, True = active; a new tensor each time."""
        return unpack_mask(self.bits, self.shape)

    def set_mask(self, mask: Tensor) -> None:
        """Change the mask's contents in place; graphs that hold ``bits`` see the new ones."""
        with torch.no_grad():
            self.bits.copy_(pack_mask(mask.to(self.bits.device)))
        self.nnz = int(mask.sum())
        self.mask_version += 1
        self._clean_value_version = -1
        self._clean_gradient = None

    # -- the value ---------------------------------------------------------------------------
    def enforce_zeros(self, parameter: nn.Parameter) -> None:
        """Make the pruned entries exactly 0, unless nothing was written since the last time."""
        if parameter._version == self._clean_value_version:
            return
        if parameter.device.type != "meta":
            with torch.no_grad():
                zero_where_(parameter, self.bits, True)
        self._clean_value_version = parameter._version

    def trust_value(self, parameter: nn.Parameter) -> None:
        """Note that whatever wrote the parameter last left the pruned entries at 0."""
        self._clean_value_version = parameter._version

    def distrust_value(self) -> None:
        """Note that the pruned entries may hold anything."""
        self._clean_value_version = -1

    # -- the gradient ------------------------------------------------------------------------
    def note_graph_gradient(self, grad: Tensor, routing: Routing) -> None:
        """Remember a gradient that a compiled graph has masked already.

        The tensor hook compares address, version and backward pass: a gradient to which any other
        use of the weight has contributed differs in one of them and is masked again.
        """
        task = torch._C._current_graph_task_id()
        self._graph_gradient = (grad.data_ptr(), grad._version, task, routing)

    def _mask_gradient(self, grad: Tensor) -> Tensor | None:
        """Tensor hook: route the gradient before it is accumulated, clipped or reduced."""
        routing = self.controller.routing
        parameter = self.parameter
        before = parameter.grad
        clean_so_far = before is None or self._is_clean(before, routing)
        known, self._graph_gradient = self._graph_gradient, None
        self._clean_gradient = None
        if routing is Routing.ALL:
            return None
        self._accumulating_clean = clean_so_far
        task = torch._C._current_graph_task_id()
        if known == (grad.data_ptr(), grad._version, task, routing):
            return None
        if self.bits.device != grad.device:
            self.bits = self.bits.to(grad.device)
        masked: Tensor = route_gradient(
            grad, self.bits, routing.keeps_active
        )
        return masked

    def _note_accumulated(self, parameter: Tensor) -> None:
        """Post-accumulate hook: remember that ``parameter.grad`` is masked as it stands."""
        grad = parameter.grad
        routing = self.controller.routing
        if routing is not Routing.ALL and grad is not None and self._accumulating_clean:
            self._clean_gradient = (weakref.ref(grad), grad._version, routing)

    _accumulating_clean = False

    def _is_clean(self, grad: Tensor, routing: Routing) -> bool:
        known = self._clean_gradient
        return (
            known is not None
            and known[0]() is grad
            and known[1] == grad._version
            and known[2] is routing
        )

    def clean_gradient(self, grad: Tensor, routing: Routing) -> None:
        """Mask ``grad`` in place unless it is known to be masked (clipping and noise rewrite it)."""
        if routing is Routing.ALL or self._is_clean(grad, routing):
            return
        with torch.no_grad():
            zero_where_(grad, self.bits, routing.keeps_active)
