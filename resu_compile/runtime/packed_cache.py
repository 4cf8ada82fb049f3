"""Packed forms of masked weights for inference, packed again only after a weight has changed.

Several weights that share their input are packed as one, rows after rows. Where the new contents
fit, they go into the tensors that are there: then no compiled graph is specialised anew and no CUDA
graph is recorded again.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from resu_compile.kernels.packed_linear import Packed, PackedLinear
from resu_compile.kernels.plan import Kernel
from resu_compile.runtime.packed_room import pack_with_room
from resu_compile.state import MaskedWeight

Member = tuple[MaskedWeight, bool]  # a masked matrix, and whether its transpose is packed


@dataclass
class _Entry:
    """The formats of one weight, or of several as one, each with what it was made from."""

    members: tuple[ref[MaskedWeight], ...]
    packed: dict[Kernel, tuple[tuple[Hashable, ...], Packed]] = field(default_factory=dict)


_cache: WeakKeyDictionary[MaskedWeight, dict[tuple[tuple[int, bool], ...], _Entry]]
_cache = WeakKeyDictionary()


def packed_of(members: Sequence[Member], formats: Collection[Kernel]) -> PackedLinear:
    """The packed form of one weight, or of several whose rows follow each other.

    Args:
        members: masked matrices (out, in), or (in, out) where the transpose is packed, so that
            rows are always output features; all with the same inputs.
        formats: the kernels whose formats are wanted.
    """
    now = tuple(_content(weight) for weight, _ in members)
    entry = _entry_of(members)
    # weights whose dense storage goes never change again
    fixed = all(weight.controller.released is not None for weight, _ in members)
    stale = [k for k in sorted(formats) if k not in entry.packed or entry.packed[k][0] != now]
    if stale:
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            value, mask = _joined(members)
            for kernel in stale:
                known = entry.packed.get(kernel)
                old = None if known is None else known[1]
                packed = pack_with_room(kernel, value, mask, old, fixed=fixed)
                entry.packed[kernel] = now, packed
    shape = (sum(_matrix_shape(member)[0] for member in members), _matrix_shape(members[0])[1])
    return PackedLinear(shape, {kernel: entry.packed[kernel][1] for kernel in formats})


def content_of(members: Sequence[Member]) -> tuple[Hashable, ...]:
    """Changes whenever what ``packed_of`` gives may have."""
    return tuple(_content(weight) for weight, _ in members)


def keep_packed(weight: MaskedWeight) -> None:
    """Tell that the dense storage of ``weight`` is gone and what is packed stands for it.

    To be called right after it was packed, before anything could change.
    """
    for entries in _cache.values():
        for entry in entries.values():
            for position, member in enumerate(entry.members):
                if member() is not weight:
                    continue
                for kernel, (keys, packed) in list(entry.packed.items()):
                    if keys[position] == weight.content_key():
                        fixed = (*keys[:position], _RELEASED, *keys[position + 1 :])
                        entry.packed[kernel] = fixed, packed
                    else:
                        del entry.packed[kernel]  # of values that are no more


_RELEASED = "released"


def _content(weight: MaskedWeight) -> Hashable:
    return _RELEASED if weight.is_released else weight.content_key()


def _entry_of(members: Sequence[Member]) -> _Entry:
    entries = _cache.setdefault(members[0][0], {})
    key = tuple((id(weight), transposed) for weight, transposed in members)
    entry = entries.get(key)
    if entry is None or any(
        known() is not weight for known, (weight, _) in zip(entry.members, members, strict=True)
    ):
        entry = entries[key] = _Entry(tuple(ref(weight) for weight, _ in members))
    return entry


def _matrix_shape(member: Member) -> tuple[int, int]:
    weight, transposed = member
    rows, columns = weight.shape
    return (columns, rows) if transposed else (rows, columns)


def _joined(members: Sequence[Member]) -> tuple[Tensor, Tensor]:
    """Value and mask of the matrix that is packed."""
    values = [weight.dense() for weight, _ in members]
    masks = [weight.mask for weight, _ in members]
    turned = [transposed for _, transposed in members]
    values = [value.t() if t else value for value, t in zip(values, turned, strict=True)]
    masks = [mask.t() if t else mask for mask, t in zip(masks, turned, strict=True)]
    if len(members) == 1:
        return values[0], masks[0]
    return torch.cat(values), torch.cat(masks)
