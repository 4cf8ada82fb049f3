"""A tree of plain data and tensors as JSON and named tensors, and back, without pickle.

JSON has neither tuples nor keys other than strings nor NaN, so that every value that JSON would
change is an object with one key, its tag; lists, strings, numbers, true, false and null stand
for themselves:

    {"dict": {"a": 1}}                       a dict whose keys are all strings
    {"items": [[3, "x"], [null, "y"]]}       any other dict
    {"ordered": [items, metadata]}           an OrderedDict, with what ``state_dict`` hangs on it
    {"counter": items}                       a Counter (``MultiStepLR`` keeps one)
    {"tuple": [1, 2]}
    {"int": "0x..."}                         an int of more than 64 bits
    {"float": "7ff0000000000000"}            infinity or NaN: the eight bytes of the double
    {"tensor": [name, dtype, shape]}
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.errors import ArgumentError, ArgumentTypeError

# What safetensors has a name for since 0.4; the rest is stored as bytes.
_NATIVE_DTYPES = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
)
_RESERVED = "__metadata__"  # safetensors keeps its own header under this name


def encode_tree(state: object) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can hold of ``state``, and its tensors by name.

    A tensor is named by its place in the tree, ``optimizer.state[3].exp_avg``. The same tensor
    at several places (same memory, shape, strides and dtype) is stored once and loads as one
    tensor again; tensors that merely overlap are stored apart and load apart.

    Args:
        state: dicts (keys: str, int, float, bool, None), lists, tuples, str, int, float, bool,
            None and strided tensors of any dtype, nested.

    Returns:
        The tree, and contiguous tensors that share no memory with each other; they may share it
        with those in ``state``.

    Raises:
        ArgumentTypeError: a value or key of another type; the message names its place.
        ArgumentError: the tree contains itself, or is too deep.
    """
    encoder = _Encoder()
    try:
        tree = encoder.encode(state, "")
    except RecursionError:
        raise ArgumentError(
            "state: expected a tree of limited depth, got one that contains itself or is too deep"
        ) from None
    return tree, encoder.tensors


def decode_tree(tree: object, tensors: Mapping[str, Tensor]) -> Any:
    """The state that ``encode_tree`` took apart.

    Args:
        tree: as it came out of JSON.
        tensors: the tensors by name, on whatever device they shall be.

    Raises:
        ValueError: the tree is none that ``encode_tree`` makes, or does not fit ``tensors``.
    """
    return _Decoder(tensors).decode(tree)


class _Encoder:
    """Walks a state; collects its tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._references: dict[tuple[object, ...], dict[str, Any]] = {}
        self._storages: set[int] = set()  # of ``tensors``, which keeps them alive

    def encode(self, value: object, path: str) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if type(value) is str:
            return value
        if type(value) is int:
            return value if value.bit_length() <= 64 else {"int": hex(value)}
        if isinstance(value, float):  # numpy.float64 is one
            return _encode_float(float(value))
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if type(value) is list:
            return self._sequence(value, path)
        if type(value) is tuple:
            return {"tuple": self._sequence(value, path)}
        if type(value) is dict:
            return self._dict(value, path)
        if type(value) is OrderedDict:
            metadata = getattr(value, "_metadata", None)  # versions, by nn.Module.state_dict
            extra = self.encode(metadata, f"{path}._metadata")
            return {"ordered": [self._items(value, path), extra]}
        if type(value) is Counter:
            return {"counter": self._items(value, path)}
        raise _refusal(value, path)

    def _sequence(self, values: Iterable[object], path: str) -> list[Any]:
        return [self.encode(value, f"{path}[{i}]") for i, value in enumerate(values)]

    def _dict(self, values: dict[Any, object], path: str) -> dict[str, Any]:
        if all(type(key) is str for key in values):
            return {"dict": {k: self.encode(v, _child(path, k)) for k, v in values.items()}}
        return {"items": self._items(values, path)}

    def _items(self, values: Mapping[Any, object], path: str) -> list[Any]:
        items = []
        for key, value in values.items():
            child = _child(path, key)
            if key is not None and not isinstance(key, (str, int, float)):
                raise _refusal(key, child, what="a key that is str, int, float, bool or None")
            items.append([self.encode(key, child), self.encode(value, child)])
        return items

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise _refusal(tensor, path, what="a plain strided tensor")
        if tensor.device.type == "meta" or tensor.is_quantized or tensor.is_nested:
            raise _refusal(tensor, path, what="a plain tensor with values")
        value = tensor.detach()
        key = (
            value.untyped_storage()._cdata,
            value.storage_offset(),
            value.shape,
            value.stride(),
            value.dtype,
            value.is_conj(),
            value.is_neg(),
        )
        if key in self._references:
            return self._references[key]
        plain = value.resolve_conj().resolve_neg().cpu().contiguous()
        if plain.untyped_storage()._cdata in self._storages:
            plain = plain.clone()
        self._storages.add(plain.untyped_storage()._cdata)
        name = self._free_name(path)
        self.tensors[name] = plain if plain.dtype in _NATIVE_DTYPES else _to_bytes(plain, path)
        dtype = str(plain.dtype).removeprefix("torch.")
        self._references[key] = {"tensor": [name, dtype, list(plain.shape)]}
        return self._references[key]

    def _free_name(self, path: str) -> str:
        wanted = path.encode("utf-8", "replace").decode() or "state"
        name, copies = wanted, 1
        while name in self.tensors or name == _RESERVED:  # keys may hold dots and brackets
            copies += 1
            name = f"{wanted}#{copies}"
        return name


class _Decoder:
    """Puts a state together again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[str, Tensor] = {}
        self._tags: dict[str, Callable[[Any], object]] = {
            "dict": lambda body: {key: self.decode(value) for key, value in body.items()},
            "items": lambda body: dict(self._items(body)),
            "ordered": self._ordered,
            "counter": lambda body: Counter(dict(self._items(body))),
            "tuple": lambda body: tuple(self.decode(value) for value in body),
            "int": lambda body: int(body, 16),
            "float": lambda body: struct.unpack(">d", bytes.fromhex(body))[0],
            "tensor": self._tensor,
        }

    def decode(self, tree: object) -> Any:
        if isinstance(tree, list):
            return [self.decode(value) for value in tree]
        if not isinstance(tree, dict):
            return tree
        if len(tree) != 1:
            raise ValueError(f"expected an object with one key, got {sorted(tree)}")
        ((tag, body),) = tree.items()
        if tag not in self._tags:
            raise ValueError(f"expected a tag among {', '.join(self._tags)}; got {tag!r}")
        return self._tags[tag](body)

    def _items(self, body: list[Any]) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(value)) for key, value in body]

    def _ordered(self, body: list[Any]) -> OrderedDict[Any, Any]:
        items, metadata = body
        made = OrderedDict(self._items(items))
        if metadata is not None:
            made._metadata = self.decode(metadata)  # type: ignore[attr-defined]
        return made

    def _tensor(self, body: list[Any]) -> Tensor:
        name, dtype_name, shape = body
        if name in self._made:
            return self._made[name]
        if name not in self._tensors:
            raise ValueError(f"expected a tensor {name!r}, got none of that name")
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"expected a dtype of this torch for {name!r}, got {dtype_name!r}")
        stored = self._tensors[name]
        tensor = stored if dtype in _NATIVE_DTYPES else _from_bytes(stored, dtype, shape)
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ValueError(
                f"expected {dtype_name} of shape {shape} for {name!r}, "
                f"got {tensor.dtype} of shape {list(tensor.shape)}"
            )
        self._made[name] = tensor
        return tensor


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value  # json writes the shortest text that reads back as the same double
    return {"float": struct.pack(">d", value).hex()}


def _to_bytes(tensor: Tensor, path: str) -> Tensor:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    try:
        return flat.reshape(-1).view(torch.uint8)
    except RuntimeError as error:
        raise _refusal(tensor, path, what="a tensor whose entries are whole bytes") from error


def _from_bytes(stored: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not dtype.is_complex:
        return stored.view(dtype).reshape(shape)
    return torch.view_as_complex(stored.view(dtype.to_real()).reshape([*shape, 2]))


def _child(path: str, key: object) -> str:
    if type(key) is not str:
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key


def _refusal(value: object, path: str, what: str = "") -> ArgumentTypeError:
    wanted = what or "dict, list, tuple, str, int, float, bool, None or a tensor"
    kind = type(value)
    got = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, Tensor):
        got += f" ({value.layout}, {value.dtype}, on {value.device})"
    return ArgumentTypeError(
        f"{path or 'state'}: expected {wanted}, got {got}; "
        "leave it out of the state or turn it into plain data"
    )
