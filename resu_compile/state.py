"""One masked weight: its packed mask, and what is known of its value and its gradient.

The masks live beside the model, in the controller, and never in the module: the class, the
parameter names and the ``state_dict()`` keys stay the model's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from resu_compile.errors import WeightError
from resu_compile.kernels.bit_rank import block_ranks, gather_by_rank, scatter_by_rank_
from resu_compile.kernels.effective_weight import route_gradient
from resu_compile.kernels.mask_bits import pack_mask, unpack_mask, zero_where_
from resu_compile.phase import Routing
from resu_compile.runtime.released import hollow, is_released, refill
from resu_compile.selection import NamedWeight

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller

_REGISTRY: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_registry_epoch = 0

_REPAIR = (
    "controller(model).release() makes a model plain, then sparsify(model, from_zeros=True) takes "
    "it up as it is now"
)


def masked_weight_of(parameter: Tensor) -> MaskedWeight | None:
    """The masked weight that ``parameter`` is, or None."""
    found: MaskedWeight | None = _REGISTRY.get(parameter)
    return found


def registry_epoch() -> int:
    """A number that grows whenever a parameter is registered or forgotten."""
    return _registry_epoch


class MaskedWeight:
    """A parameter with a mask.

    The parameter is held weakly and found through the module that owns it; the controller is held,
    so that masks last as long as any of their weights is in use.

    Attributes:
        name: first name of the parameter in its model.
        aliases: its other names.
        attribute: the parameter's name in the module that owns it.
        controller: the controller that this weight belongs to.
        shape: shape of the parameter.
        bits: uint8, the packed mask (kernels/mask_bits.py), on the parameter's device.
        nnz: number of active entries.
        mask_version: grows with every change of the mask.
        step_count: grows with every optimizer step; fused optimizers write a parameter without
            changing its ``_version``.
        backward_count: grows with every gradient that arrives.
        trusts_versions: False once a write was found that autograd's version counters do not show.
    """

    def __init__(self, named: NamedWeight, mask: Tensor, controller: Controller) -> None:
        self.name = named.name
        self.aliases = named.aliases
        self.attribute = named.attribute
        self.controller = controller
        self.shape = mask.shape
        self.bits = pack_mask(mask)
        self.nnz = int(mask.sum())
        self.mask_version = 0
        self.step_count = 0
        self.backward_count = 0
        self.trusts_versions = True
        self._owner = weakref.ref(named.owner)
        self._parameter: weakref.ref[nn.Parameter] | None = None
        self._handles: list[RemovableHandle] = []
        self._clean_value: tuple[int, int] | None = None
        self._graph_gradient: tuple[int, int, int, Routing] | None = None
        self._clean_gradient: tuple[weakref.ref[Tensor], int, Routing] | None = None
        self._sum_is_clean = False
        self._ranks: dict[bool, tuple[int, Tensor]] = {}
        self.bind()

    # -- the parameter -----------------------------------------------------------------------
    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        found = self._owner()
        if found is None:
            raise WeightError(
                f"{self.name}: expected the module that holds it to be alive, but the model was "
                f"deleted or the layer replaced; {_REPAIR}"
            )
        return found

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model holds it now; its masks and hooks follow it."""
        current = self.owner._parameters.get(self.attribute)
        if current is None:
            raise WeightError(
                f"{self.name}: expected the model to still hold this parameter, found none; "
                f"{_REPAIR}"
            )
        if self._parameter is None or current is not self._parameter():
            self.bind()
        return current

    def refresh(self, zero: bool) -> None:
        """Catch up with what happened to the parameter; ``zero`` makes its pruned entries 0."""
        parameter = self.parameter
        if not isinstance(parameter, nn.Parameter):
            return  # the tensors that torch.func.functional_call puts here are the caller's
        self.follow(parameter)
        if zero:
            self.enforce_zeros(parameter)

    def bind(self) -> None:
        """Attach to the parameter that the owner holds now (``to_empty`` and swaps make new ones).

        Raises:
            WeightError: if the new parameter has another shape, or is no plain tensor.
        """
        global _registry_epoch
        owner = self._owner()
        parameter = None if owner is None else owner._parameters.get(self.attribute)
        if not isinstance(parameter, nn.Parameter):
            return  # gone, or lent by torch.func.functional_call
        if parameter.shape != self.shape:
            raise WeightError(
                f"{self.name}: expected shape {tuple(self.shape)} of its mask, the parameter is "
                f"now {tuple(parameter.shape)}; controller(model).release() and sparsify again"
            )
        if is_traceable_wrapper_subclass(parameter):
            raise WeightError(
                f"{self.name}: expected a plain tensor, the parameter is now a "
                f"{type(parameter).__name__}; controller(model).release() before the model is "
                "sharded or quantised"
            )
        self.unbind()
        self._parameter = weakref.ref(parameter)
        _REGISTRY[parameter] = self
        _registry_epoch += 1
        self._clean_value = None
        self._attach_hooks(parameter)

    def unbind(self) -> None:
        """Forget the parameter and take the hooks off it."""
        global _registry_epoch
        for handle in self._handles:
            handle.remove()
        self._handles = []
        old = None if self._parameter is None else self._parameter()
        if old is not None and _REGISTRY.get(old) is self:
            del _REGISTRY[old]
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
            self._move_bits(parameter.device)

    def _move_bits(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # masks outlive a model's first call
            self.bits = self.bits.to(device)

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

    def ranks(self, keep: bool) -> Tensor:
        """``block_ranks`` of the present mask, kept until it changes: 4 bytes for 1024 entries."""
        known = self._ranks.get(keep)
        if known is None or known[0] != self.mask_version or known[1].device != self.bits.device:
            known = (self.mask_version, block_ranks(self.bits, self.numel, keep))
            self._ranks[keep] = known
        return known[1]

    def gather(self, x: Tensor, keep: bool) -> Tensor:
        """The entries of ``x`` (shape of the weight) on one side of the mask, as a vector."""
        count = self.nnz if keep else self.numel - self.nnz
        ranks = self.ranks(keep) if x.is_cuda else None
        side: Tensor = gather_by_rank(x, self.bits, keep, count, ranks)
        return side

    def scatter_(self, x: Tensor, values: Tensor, keep: bool) -> None:
        """Write ``values`` into one side of the mask of ``x``, in place."""
        scatter_by_rank_(x, values, self.bits, keep, self.ranks(keep) if x.is_cuda else None)

    def set_mask(self, mask: Tensor) -> None:
        """Change the mask's contents in place; graphs that hold ``bits`` see the new ones."""
        with torch.no_grad():
            self.bits.copy_(pack_mask(mask.to(self.bits.device)))
        self.nnz = int(mask.sum())
        self.mask_version += 1
        self._clean_value = None
        self._clean_gradient = None

    # -- the value ---------------------------------------------------------------------------
    def content_key(self) -> tuple[int, int, int, int, torch.device]:
        """Changes whenever the masked value may have; for caches of what is made from it."""
        parameter = self.parameter
        version, address = _stamp(parameter)
        return (version, address, self.step_count, self.mask_version, parameter.device)

    def enforce_zeros(self, parameter: nn.Parameter) -> None:
        """Make the pruned entries exactly 0, unless nothing was written since the last time."""
        if self._is_zeroed(parameter):
            return
        if parameter.device.type != "meta":
            with torch.no_grad():
                zero_where_(parameter, self.bits, True)
        self._clean_value = _stamp(parameter)

    def _is_zeroed(self, parameter: nn.Parameter) -> bool:
        if is_released(parameter):  # there is nothing to be written to
            return True
        return self.trusts_versions and _stamp(parameter) == self._clean_value

    def trust_value(self, parameter: nn.Parameter) -> None:
        """Note that whatever wrote the parameter last left the pruned entries at 0."""
        self._clean_value = _stamp(parameter)

    def distrust_value(self) -> None:
        """Note that the pruned entries may hold anything."""
        self._clean_value = None

    # -- without dense storage -----------------------------------------------------------------
    @property
    def is_released(self) -> bool:
        """Whether only packed forms of the value are left."""
        return is_released(self.parameter)

    def dense(self) -> Tensor:
        """The value, unpacked if need be; the parameter's own memory if not."""
        parameter = self.parameter
        return parameter.read() if is_released(parameter) else parameter.detach()

    def release_value(self, read: Callable[[], Tensor], converted: Callable[[], None]) -> int:
        """Free the dense storage; ``read`` gives the value from now on. Returns the bytes.

        ``converted`` is called if the model is moved or cast, which makes the weight dense again.
        """
        return hollow(self.parameter, self.name, read, converted)

    def restore_value(self) -> None:
        """Store the value densely again."""
        if self.is_released:
            refill(self.parameter)
            self._clean_value = None

    # -- the gradient ------------------------------------------------------------------------
    @property
    def live(self) -> Tensor | None:
        """Packed mask of the places that train, in a resurrection that chose a few; else None."""
        running = self.controller.resurrection
        return None if running is None else running.live.get(self.name)

    def note_graph_gradient(self, grad: Tensor, routing: Routing) -> None:
        """Remember a gradient that a compiled graph has masked already.

        The tensor hook compares address, version and backward pass: a gradient to which any other
        use of the weight has contributed differs in one of them and is masked again.
        """
        task = torch._C._current_graph_task_id()
        self._graph_gradient = (grad.data_ptr(), grad._version, task, routing)

    def _mask_gradient(self, grad: Tensor | None) -> Tensor | None:
        """Tensor hook: route the gradient before it is accumulated, clipped or reduced."""
        if grad is None:  # an autograd.Function said that there is none
            return None
        routing = self.controller.routing
        known, self._graph_gradient = self._graph_gradient, None
        self.backward_count += 1
        parameter = None if self._parameter is None else self._parameter()
        before = None if parameter is None else parameter.grad
        self._sum_is_clean = (before is None or self._is_clean(before, routing)) and (
            parameter is not None and self._is_last_hook(parameter)
        )
        self._clean_gradient = None
        live = self.live
        if routing is Routing.ALL and live is None:
            return None
        task = torch._C._current_graph_task_id()
        if live is None and known == (grad.data_ptr(), grad._version, task, routing):
            return None
        if self.bits.device != grad.device:
            self._move_bits(grad.device)
        masked: Tensor = route_gradient(grad, *self._routed(routing))
        return masked

    def _routed(self, routing: Routing) -> tuple[Tensor, bool]:
        """Packed bits, and whether gradients reach their places or those outside of them."""
        live = self.live
        if live is not None:
            return live.to(self.bits.device), True
        return self.bits, routing.keeps_active

    def forget_clean_gradient(self) -> None:
        """Note that other places train from now on."""
        self._clean_gradient = None

    def _is_last_hook(self, parameter: nn.Parameter) -> bool:
        """False if a hook of the user's rewrites the gradient after ours."""
        hooks = parameter._backward_hooks
        return hooks is not None and next(reversed(hooks)) == self._handles[0].id

    def _note_accumulated(self, parameter: Tensor) -> None:
        """Post-accumulate hook: remember that ``parameter.grad`` is masked as it stands."""
        grad = parameter.grad
        if grad is not None and self._sum_is_clean:
            self._note_clean(grad, self.controller.routing)

    def _note_clean(self, grad: Tensor, routing: Routing) -> None:
        if routing is not Routing.ALL or self.live is not None:
            self._clean_gradient = (weakref.ref(grad), grad._version, routing)

    def _is_clean(self, grad: Tensor, routing: Routing) -> bool:
        known = self._clean_gradient
        return (
            self.trusts_versions
            and known is not None
            and known[0]() is grad
            and known[1] == grad._version
            and known[2] is routing
        )

    def clean_gradient(self, parameter: nn.Parameter, routing: Routing) -> None:
        """Mask ``parameter.grad`` unless nothing was written since it was (clipping, noise)."""
        grad = parameter.grad
        if grad is None or (routing is Routing.ALL and self.live is None):
            return
        if self._is_clean(grad, routing):
            return
        bits, keep = self._routed(routing)
        with torch.no_grad():
            if _is_expanded(grad):  # no room for a zero of its own
                grad = parameter.grad = route_gradient(grad, bits, keep)
            else:
                zero_where_(grad, bits, keep)
        self._note_clean(grad, routing)

    # -- writes that nobody saw ----------------------------------------------------------------
    def hidden_write(self, parameter: nn.Parameter) -> Tensor | None:
        """Whether value or gradient is not 0 where it has to be, and no version tells of it.

        That is in the pruned places; in a resurrection, in those that it did not choose.

        Returns:
            bool, shape (), on the parameter's device; None if there is nothing to look at.
        """
        if is_released(parameter):
            return None
        running, grad = self.controller.resurrection, parameter.grad
        if running is None:
            held: Tensor | None = self.bits
            live, routing, is_zeroed = self.bits, Routing.ACTIVE, self._is_zeroed(parameter)
        else:
            held = self.bits if running.hidden is not None else running.held(self)
            live, _ = self._routed(running.routing)
            routing, is_zeroed = running.routing, self.trusts_versions
        if held is None:  # all of them may hold theta
            return None
        known = [(parameter.detach(), held)] if is_zeroed else []
        if grad is not None and self._is_clean(grad, routing):
            known.append((grad.detach(), live))
        if not known:
            return None
        found = [(x.ne(0) & ~unpack_mask(bits, self.shape)).any() for x, bits in known]
        return torch.stack(found).any()


def _stamp(parameter: Tensor) -> tuple[int, int]:
    """Changes when autograd sees a write, and when ``.data`` is replaced."""
    return (parameter._version, parameter.data_ptr())


def _is_expanded(tensor: Tensor) -> bool:
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
