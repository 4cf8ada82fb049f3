"""A parameter without its dense storage: shape and name stay, the values are read when asked for.

What touches the values in eager mode (a call outside of a compiled graph, ``state_dict()``, a copy)
works on a dense tensor that is unpacked for it and dropped again; what would write or train raises.
Moving or casting the model makes the parameter dense again.

A graph of another backend that a released weight is traced into unpacks it at each call, by the op
``resu_compile::released_value``; passes/released_values.py takes that out of the package's own.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from resu_compile.errors import PhaseError

RESTORE = "controller(model).restore_dense() brings the dense weights back"

# attributes that show values; all others tell of the tensor itself
_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
# methods that do so too, beside all that are called is_... or _is_...
_METADATA = frozenset(
    {
        *("size", "dim", "numel", "nelement", "stride", "storage_offset", "element_size"),
        *("data_ptr", "untyped_storage", "get_device", "__len__", "__hash__", "requires_grad_"),
        *("register_hook", "register_post_accumulate_grad_hook", "sparse_dim", "dense_dim"),
        "_has_compatible_shallow_copy_type",
    }
)
# conversions that give the tensor itself where there is nothing to do
_CONVERSIONS = frozenset(
    {"to", "cpu", "cuda", "type", "type_as", "half", "float", "double", "bfloat16"}
)
_SETTABLE = frozenset({"grad", "requires_grad"})
# uses from which no gradient is expected; conversions go on to write, which says more
_READ_ONLY_USES = _CONVERSIONS | {"detach", "data", "clone", "numpy", "tolist"}


class ReleasedParameter(nn.Parameter):
    """What the class of a parameter is changed to while its dense storage is freed.

    Attributes:
        read: gives the dense value, a new tensor of the parameter's shape.
        converted: called after it became dense again by a conversion.
        weight_name: its name in the model.
    """

    read: Callable[[], Tensor]
    converted: Callable[[], None]
    weight_name: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Metadata is that of the parameter; everything else sees the dense value."""
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():  # traced
            with torch._C.DisableTorchFunctionSubclass():
                args = tuple([_traced(value) for value in args])
                kwargs = {key: _traced(value) for key, value in kwargs.items()}
                return func(*args, **kwargs)
        if torch.compiler.is_compiling():  # looked at by a tracer
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.ops.resu_compile.released_value.default:
            # in a graph: torch 2.11, unlike 2.13, leaves functions of subclasses on around it
            value: Tensor = args[0].read()
            return value
        name, verb = _name_of(func)
        target = kwargs.get("out", args[0] if args else None)
        if _is_metadata(name, verb):
            if name == "untyped_storage" and _is_saved_by_export(sys._getframe(1)):
                raise PhaseError(
                    f"{args[0].weight_name}: expected a dense weight to save, but release_dense() "
                    "freed it; resu_compile.export(model, inputs, path) writes the packed one, or "
                    f"{RESTORE}"
                )
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(target, ReleasedParameter):
            if name in _CONVERSIONS and _changes_nothing(func, target, args[1:], kwargs):
                return target
            if name == "data" and verb == "__set__" and _is_conversion(target, args[1]):
                return refill(target, args[1])
        writes = verb == "__set__" or "out" in kwargs or _writes(name)
        if writes and isinstance(target, ReleasedParameter):
            raise PhaseError(
                f"{target.weight_name}: expected a dense weight to write to ({name}), but "
                f"release_dense() freed it; {RESTORE}"
            )
        if torch.is_grad_enabled() and name not in _READ_ONLY_USES:
            _refuse_training(args, kwargs)
        dense = tree_map_only(ReleasedParameter, lambda p: p.read(), (args, dict(kwargs)))
        return func(*dense[0], **dense[1])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype; the values stay packed."""
        del tensor_contents
        return f"{type(self).__name__}({self.weight_name}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A plain dense parameter."""
        copied = memo[id(self)] = nn.Parameter(self.read(), self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as a plain dense parameter."""
        return nn.Parameter(self.read(), self.requires_grad).__reduce_ex__(protocol)


def _traced(value: Any) -> Any:
    """What a traced call takes in place of an argument."""
    if isinstance(value, ReleasedParameter):
        return torch.ops.resu_compile.released_value.default(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_traced(part) for part in value])
    return value


def _changes_nothing(
    func: Callable[..., Any],
    parameter: ReleasedParameter,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether a conversion gives what it is called on."""
    with torch._C.DisableTorchFunctionSubclass():
        empty = parameter.new_empty((0,) * parameter.dim())
        return func(empty, *args, **kwargs) is empty


def _is_conversion(parameter: ReleasedParameter, value: Any) -> bool:
    """Whether ``Module.to`` and its like set this as ``.data``, and not a loop of the user's."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return False
    same = (value.dtype, value.device) == (parameter.dtype, parameter.device)
    return value is parameter or not same


def _is_saved_by_export(frame: types.FrameType) -> bool:
    """Whether ``torch.export.save`` asks: it stores bytes of dense values by strides of none."""
    return str(frame.f_globals.get("__name__")).startswith("torch.export.")


def _name_of(func: Callable[..., Any]) -> tuple[str, str]:
    """Name of what is called or of the attribute; and ``"__get__"`` or ``"__set__"`` of that."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", ""), name
    return name, ""


def _is_metadata(name: str, verb: str) -> bool:
    if verb:
        return name in _SETTABLE if verb == "__set__" else name not in _VALUES
    return name in _METADATA or (name.startswith(("is_", "_is_")) and name != "is_nonzero")


def _writes(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i") and name not in _NOT_IN_PLACE
    return name.endswith("_")


_NOT_IN_PLACE = frozenset({"__index__", "__int__", "__invert__", "__iter__", "__init__"})


def _refuse_training(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    def refuse(parameter: ReleasedParameter) -> None:
        if parameter.requires_grad:
            raise PhaseError(
                f"{parameter.weight_name}: expected a call without gradients, because "
                "release_dense() freed its dense weight for inference; use torch.no_grad() or "
                f"torch.inference_mode(); {RESTORE} for training"
            )

    tree_map_only(ReleasedParameter, refuse, (args, dict(kwargs)))


# -- in graphs of other backends -----------------------------------------------------------------
# address of the one NaN that a parameter holds -> the parameter
_by_address: WeakValueDictionary[int, ReleasedParameter] = WeakValueDictionary()


@torch.library.custom_op(
    "resu_compile::released_value", mutates_args=(), tags=(torch.Tag.needs_exact_strides,)
)
def released_value(stand_in: Tensor) -> Tensor:
    """The dense value of the released parameter that ``stand_in`` is, or is an alias of.

    A dense tensor gives a copy of itself.

    Raises:
        PhaseError: it is neither, because the graph was taken elsewhere.
    """
    parameter = _by_address.get(stand_in.data_ptr())
    if parameter is None or not is_released(parameter):
        if 1 < stand_in.numel() <= stand_in.untyped_storage().nbytes() // stand_in.itemsize:
            return stand_in.clone()  # dense again: torch 2.11 does not capture anew for that
        raise PhaseError(
            "released_value: expected a weight that release_dense() freed in this process, got "
            f"another tensor of shape {tuple(stand_in.shape)}; {RESTORE} before a graph is "
            "taken elsewhere, and resu_compile.export(model, ...) writes the packed weights"
        )
    return parameter.read()


@released_value.register_fake
def _(stand_in: Tensor) -> Tensor:
    return stand_in.new_empty(stand_in.shape)


def _no_gradient(_ctx: Any, *_: Any) -> Any:
    raise PhaseError(
        "backward: expected a call without gradients, because release_dense() freed a dense "
        f"weight for inference; {RESTORE} for training"
    )


released_value.register_autograd(_no_gradient)


def is_released(parameter: Any) -> TypeGuard[ReleasedParameter]:
    """Whether the dense storage of ``parameter`` is freed."""
    return type(parameter) is ReleasedParameter


def run_eagerly(gm: fx.GraphModule, args: Sequence[Any]) -> Any:
    """``gm(*args)`` where some of ``args`` may be released: each is dense while a node reads it.

    The dense forms of all at once would be what ``release_dense`` is there to avoid. Around graphs
    that it captures, Dynamo turns functions of tensor subclasses off.
    """
    if not any([is_released(value) for value in args]):
        return gm(*args)
    return _Unpacking(gm).run(*args)


class _Unpacking(fx.Interpreter):
    """Forgets each value after its last use, as ``fx.Interpreter`` does."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, released ones among them read."""
        return fx.node.map_aggregate(
            super().fetch_args_kwargs_from_env(n),
            lambda value: value.read() if is_released(value) else value,
        )


def hollow(
    parameter: nn.Parameter,
    name: str,
    read: Callable[[], Tensor],
    converted: Callable[[], None] = lambda: None,
) -> int:
    """Free the storage of ``parameter``, which stays the same object; returns the bytes.

    In its place is one NaN, seen by nothing but code that goes around torch's functions.
    """
    size = parameter.numel() * parameter.element_size()
    with torch.no_grad():
        stand_in = parameter.new_full((), torch.nan).expand(parameter.shape)
    parameter.data = stand_in
    parameter.__class__ = ReleasedParameter
    released = cast("ReleasedParameter", parameter)
    released.read, released.converted, released.weight_name = read, converted, name
    _by_address[parameter.data_ptr()] = released
    return size


def refill(parameter: nn.Parameter, value: Tensor | None = None) -> None:
    """Undo ``hollow``: the parameter is dense and plain again.

    Args:
        parameter: a released one.
        value: what it holds from now on, in another dtype or on another device; None is its own.
    """
    if value is parameter:
        return
    released = cast("ReleasedParameter", parameter)
    dense = released.read() if value is None else value
    converted = released.converted
    parameter.__class__ = nn.Parameter
    del released.read, released.converted, released.weight_name
    parameter.data = dense
    if value is not None:
        converted()


@contextmanager
def hollow_as_plain(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let released ones among ``parameters`` be plain within the block, for a tracer.

    It sees shapes and dtypes; what it would read is NaN.
    """
    released: list[nn.Parameter] = [p for p in parameters if is_released(p)]
    for parameter in released:
        parameter.__class__ = nn.Parameter
    try:
        yield
    finally:
        for parameter in released:
            parameter.__class__ = ReleasedParameter
