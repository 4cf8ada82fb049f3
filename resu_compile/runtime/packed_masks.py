"""Masks of many weights, one bit a position, unpacked as they are read.

The masks of a whole model exist before any weight changes. As bool tensors they would take half of
the memory that its bf16 weights take; packed they take a sixteenth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from resu_compile.kernels.mask_bits import pack_mask, unpack_mask


@final
class PackedMasks(Mapping[str, Tensor]):
    """Parameter name -> bool mask of the weight's shape; a new tensor at each read.

    Args:
        masks: pairs of name and bool mask; packed one after another, so an iterator that makes
            them holds one at a time.
    """

    def __init__(self, masks: Iterable[tuple[str, Tensor]] = ()) -> None:
        self._bits: dict[str, tuple[Tensor, torch.Size]] = {}
        for name, mask in masks:
            self.add(name, mask)

    def add(self, name: str, mask: Tensor) -> None:
        """Take up one more mask, or another one for a name that is there."""
        self._bits[name] = (pack_mask(mask), mask.shape)

    def take(self, name: str) -> Tensor:
        """The mask of ``name``, which is not held any more."""
        bits, shape = self._bits.pop(name)
        return unpack_mask(bits, shape)

    def only(self, names: Iterable[str]) -> PackedMasks:
        """The masks of ``names``, in their order; nothing is copied."""
        found = PackedMasks()
        found._bits = {name: self._bits[name] for name in names}
        return found

    def __getitem__(self, name: str) -> Tensor:
        """The mask of ``name``, on the device that it was made on."""
        bits, shape = self._bits[name]
        return unpack_mask(bits, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def size_bytes(self) -> int:
        """Bytes of all masks as they are held."""
        return sum(bits.numel() for bits, _ in self._bits.values())
