"""Where in a weight the elements of a tensor come from: a view of it, or a copy of a view.

w.t(), w[2], w.chunk(3)[0]: a view, known by offset, sizes and strides in the weight's memory
w.bfloat16(): a copy laid out like the view it is of, known by the same
permuted and cloned: a copy laid out anew, each element with an index in the weight's memory
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Which elements of a weight a tensor holds.

    Attributes:
        offset: of the tensor, from the first element of the weight or of the copy.
        sizes: of the tensor.
        strides: of the tensor.
        copy: number of the copy that the tensor is a view of; None for the weight itself, or a copy
            laid out like it.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    copy: int | None = None


class PlaceMap:
    """Reads and writes tensors of a weight's shape at places.

    Args:
        weight: any strided tensor without overlapping elements.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._indices: list[Tensor] = []
        self._known: dict[tuple[Place, tuple[int, ...]], int] = {}

    def copied(self, place: Place, strides: tuple[int, ...]) -> int:
        """The number of the copy that a clone of ``place`` with ``strides`` is."""
        if (place, strides) not in self._known:
            laid_out = torch.empty_strided(
                place.sizes, strides, dtype=torch.int64, device=self.weight.device
            )
            laid_out.copy_(self.index(place))
            memory = laid_out.as_strided((extent(laid_out),), (1,))
            self._known[place, strides] = len(self._indices)
            self._indices.append(memory)
        return self._known[place, strides]

    def index(self, place: Place) -> Tensor:
        """int64, sizes of ``place``: where in the memory of the weight its elements are."""
        if place.copy is None:
            memory = torch.arange(extent(self.weight), device=self.weight.device)
        else:
            memory = self._indices[place.copy]
        return memory.as_strided(place.sizes, place.strides, place.offset)

    def zeros(self) -> Tensor:
        """float32 zeros, shape and strides of the weight."""
        weight = self.weight
        return torch.empty_strided(
            weight.shape, weight.stride(), dtype=torch.float32, device=weight.device
        ).zero_()

    def add(self, full: Tensor, place: Place, value: Tensor) -> None:
        """Add ``value``, which broadcasts to ``place``, to a tensor that ``zeros`` gave."""
        value = value.to(full)
        if place.copy is None:
            full.as_strided(place.sizes, place.strides, place.offset).add_(value)
        else:
            memory = full.as_strided((extent(full),), (1,))
            memory.index_add_(0, self.index(place).flatten(), value.expand(place.sizes).flatten())

    def read(self, full: Tensor, place: Place) -> Tensor:
        """What a tensor of the weight's shape and strides holds at ``place``."""
        if place.copy is None:
            return full.as_strided(place.sizes, place.strides, place.offset)
        return full.as_strided((extent(full),), (1,))[self.index(place)]

    def dims_along(self, place: Place, axis: int) -> tuple[int, ...] | None:
        """The dimensions of the weight that ``axis`` of ``place`` runs along, or None.

        A run of trailing dimensions counts as well (a flattened patch embedding).
        """
        shape, strides = self.weight.shape, self.weight.stride()
        length = place.sizes[axis]
        if length == 1:  # its stride means nothing: a dimension that no other axis runs along
            others = {
                self._step(place, i) for i, n in enumerate(place.sizes) if i != axis and n > 1
            }
            free = [i for i in range(len(shape)) if shape[i] == 1 or strides[i] not in others]
            single = [i for i in free if shape[i] == 1]
            return tuple((single or free)[-1:]) or None
        step = self._step(place, axis)
        for dim in reversed(range(len(shape))):
            if strides[dim] == step and shape[dim] >= length:
                return (dim,)
        dims: tuple[int, ...] = ()
        covered = 1
        for dim in reversed(range(len(shape))):
            if step is None or strides[dim] != step * covered:
                return None
            dims, covered = (dim, *dims), covered * shape[dim]
            if covered == length:
                return dims
        return None

    def _step(self, place: Place, axis: int) -> int | None:
        """Elements of the weight's memory from one entry of ``axis`` to the next."""
        if place.copy is None:
            return place.strides[axis]
        along = self.index(place)
        for other in reversed(range(len(place.sizes))):
            along = along if other == axis else along.select(other, 0)
        steps = along.diff()
        return int(steps[0]) if bool((steps == steps[0]).all()) else None


def extent(tensor: Tensor) -> int:
    """Elements of memory from the first to the last of ``tensor``, both included."""
    if tensor.numel() == 0:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * step for size, step in pairs)
