"""One weight in the formats that its plan needs, as a flat list of tensors and of integers.

    tensors = those of each format, formats by ascending number of their ``Kernel``
    layout  = [bit mask of formats,  then for each: number of tensors, number of integers, integers]

An operator takes both as they are, and a graph has one input for each tensor. Layout, version 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError
from resu_compile.kernels.plan import Kernel

FORMATS = (Kernel.CSR, Kernel.ROWS, Kernel.TILES, Kernel.SEMI)  # kernels with storage of their own
# Which of several formats is expanded: that of the tiles has a kernel for it
_UNPACK_ORDER = (Kernel.TILES, Kernel.ROWS, Kernel.CSR, Kernel.SEMI)


class Packed(Protocol):
    """What each format's weight offers."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, always as many."""

    @property
    def layout(self) -> tuple[int, ...]:
        """What the host has to know beside them."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors together."""


class Format(NamedTuple):
    """The functions of one format (module ``csr_linear`` shows each of them)."""

    from_tensors: Callable[[Sequence[Tensor], Sequence[int], tuple[int, int]], Any]
    pack: Callable[[Tensor, Tensor | None], Any]
    unpack: Callable[[Any], Tensor]
    linear: Callable[[Tensor, Any, Tensor | None, str], Tensor]


@functools.cache
def format_of(kernel: int) -> Format:
    """The functions of the format that ``kernel`` reads; its module is imported the first time.

    Raises:
        ArgumentError: if ``kernel`` has no storage of its own.
    """
    match kernel:
        case Kernel.CSR:
            from resu_compile.kernels import csr_linear as csr

            return Format(csr.CsrWeight.from_tensors, csr.csr_pack, csr.csr_unpack, csr.csr_linear)
        case Kernel.ROWS:
            from resu_compile.kernels.row_linear import row_linear
            from resu_compile.kernels.row_weight import RowWeight, pack_rows, unpack_rows

            return Format(RowWeight.from_tensors, pack_rows, unpack_rows, row_linear)
        case Kernel.TILES:
            from resu_compile.kernels.tile_linear import tile_linear
            from resu_compile.kernels.tile_weight import TileWeight, pack_tiles, unpack_tiles

            return Format(TileWeight.from_tensors, pack_tiles, unpack_tiles, tile_linear)
        case Kernel.SEMI:
            from resu_compile.kernels import semi_linear as semi

            return Format(
                semi.SemiWeight.from_tensors, semi.pack_semi, semi.unpack_semi, semi.semi_linear
            )
    raise ArgumentError(
        f"kernel: expected one with storage of its own, {[k.name for k in FORMATS]}, "
        f"got {Kernel(kernel).name}"
    )


class Part(NamedTuple):
    """Where one format lies in the lists of a ``PackedLinear``."""

    kernel: int
    start: int
    stop: int
    layout: tuple[int, ...]


@functools.lru_cache(maxsize=4096)  # asked at each call of the operator
def parts_of(layout: tuple[int, ...]) -> Mapping[int, Part]:
    """Kernel -> its part, read from a ``PackedLinear.layout``.

    Raises:
        ArgumentError: the integers are not such a layout.
    """
    parts: dict[int, Part] = {}
    tensor, place = 0, 1
    try:
        formats = layout[0]
        for kernel in FORMATS:
            if formats >> kernel & 1:
                tensors, integers = layout[place : place + 2]
                place += 2 + integers
                own = layout[place - integers : place]
                parts[int(kernel)] = Part(int(kernel), tensor, tensor + tensors, own)
                tensor += tensors
    except (IndexError, ValueError):
        raise ArgumentError(f"layout: expected that of a PackedLinear, got {layout}") from None
    known = sum(1 << kernel for kernel in FORMATS)
    if place != len(layout) or formats & ~known:
        raise ArgumentError(f"layout: expected that of a PackedLinear, got {layout}")
    return parts


def part_to_unpack(parts: Mapping[int, Part]) -> Part | None:
    """The part that is expanded where the dense weight is wanted; None if there is none."""
    for kernel in _UNPACK_ORDER:
        if kernel in parts:
            return parts[kernel]
    return None


@dataclass(frozen=True)
class PackedLinear:
    """An ``(N, K)`` weight, once in each of some formats.

    Attributes:
        shape: (N, K).
        weights: kernel -> the weight in its format, by ascending number.
    """

    shape: tuple[int, int]
    weights: Mapping[Kernel, Packed]

    def __post_init__(self) -> None:
        """Check that all parts are of one shape, and order them."""
        for kernel, weight in self.weights.items():
            if kernel not in FORMATS:
                raise ArgumentError(
                    f"weights: expected formats among {[k.name for k in FORMATS]}, "
                    f"got {Kernel(kernel).name}"
                )
            if tuple(weight.shape) != tuple(self.shape):
                raise ArgumentError(
                    f"weights: expected shape {tuple(self.shape)} of all formats, got "
                    f"{tuple(weight.shape)} of {Kernel(kernel).name}"
                )
        object.__setattr__(self, "weights", {k: self.weights[k] for k in sorted(self.weights)})

    @property
    def formats(self) -> frozenset[Kernel]:
        """The kernels whose formats are there."""
        return frozenset(self.weights)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all formats, one after the other."""
        return tuple(t for weight in self.weights.values() for t in weight.tensors())

    @property
    def layout(self) -> tuple[int, ...]:
        """What goes with ``tensors()``: see the module."""
        flat = [sum(1 << kernel for kernel in self.weights)]
        for weight in self.weights.values():
            flat += [len(weight.tensors()), len(weight.layout), *weight.layout]
        return tuple(flat)

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[Tensor], layout: Sequence[int], shape: tuple[int, int]
    ) -> PackedLinear:
        """The weight that ``tensors()`` and ``layout`` were taken from.

        Raises:
            ArgumentError: they do not fit together.
        """
        parts = parts_of(tuple(layout))
        expected = max((part.stop for part in parts.values()), default=0)
        if expected != len(tensors):
            raise ArgumentError(f"tensors: expected {expected} for this layout, got {len(tensors)}")
        weights = {
            Kernel(part.kernel): format_of(part.kernel).from_tensors(
                tensors[part.start : part.stop], part.layout, shape
            )
            for part in parts.values()
        }
        return cls(shape, weights)

    @property
    def size_bytes(self) -> int:
        """Bytes of all formats together."""
        return sum(weight.size_bytes for weight in self.weights.values())

    def unpack(self) -> Tensor:
        """The dense ``(N, K)`` weight, bit by bit what was kept, +0 elsewhere.

        Raises:
            ArgumentError: there is no format to read it from.
        """
        return unpack_parts(self.tensors(), parts_of(self.layout), self.shape)


def unpack_parts(
    tensors: Sequence[Tensor], parts: Mapping[int, Part], shape: tuple[int, int]
) -> Tensor:
    """The dense weight out of the lists of a ``PackedLinear``."""
    part = part_to_unpack(parts)
    if part is None:
        raise ArgumentError("packed: expected at least one format to unpack, got none")
    form = format_of(part.kernel)
    return form.unpack(form.from_tensors(tensors[part.start : part.stop], part.layout, shape))


def pack_linear(weight: Tensor, mask: Tensor | None, kernels: Collection[Kernel]) -> PackedLinear:
    """``weight`` in the formats that ``kernels`` read.

    Args:
        weight: floating point, ``(N, K)``, any strides.
        mask: bool, ``(N, K)``, True = kept; None keeps what is not 0.
        kernels: of a plan. ``DENSE`` needs nothing; ``UNPACK`` reads any format, and if no other
            kernel asks for one it gets the tiles' (on the CPU: CSR).

    Raises:
        WeightError: the weight is no floating point matrix.
        ArgumentError: the mask does not fit, or a format cannot hold this weight.
    """
    wanted = {Kernel(kernel) for kernel in kernels}
    formats = wanted & set(FORMATS)
    if Kernel.UNPACK in wanted and not formats:
        formats = {default_format(weight.device)}
    packed = {kernel: format_of(kernel).pack(weight, mask) for kernel in sorted(formats)}
    return PackedLinear((weight.shape[0], weight.shape[1]), packed)


def default_format(device: torch.device) -> Kernel:
    """The format of a weight that is only ever expanded."""
    return Kernel.TILES if device.type == "cuda" else Kernel.CSR
