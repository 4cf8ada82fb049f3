"""Which places were ever active: one bit a weight, from its first change of mask on.

    Rs = |OR of all masks so far| / N

Source: Liu et al. 2021 (In-Time Over-Parameterization), https://arxiv.org/abs/2102.02887
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resu_compile.kernels.mask_bits import unpack_mask
from resu_compile.state import MaskedWeight


class MaskHistory:
    """The OR of all masks that each weight has had.

    Masks count, not training: in the dense phase and in a resurrection the pruned places train as
    well, and become part of it only if a mask takes them up.
    """

    def __init__(self, bits: Mapping[str, Tensor] | None = None) -> None:
        self._bits = {name: value.clone() for name, value in (bits or {}).items()}

    def record(self, weight: MaskedWeight) -> None:
        """Add the mask that ``weight`` has now; to be called before and after it changes."""
        known = self._bits.get(weight.name)
        with torch.no_grad(), torch.inference_mode(False):
            if known is None:
                self._bits[weight.name] = weight.bits.clone()
            else:
                self._bits[weight.name] = known.to(weight.bits.device) | weight.bits

    def ever_active(self, weight: MaskedWeight) -> int:
        """Number of entries of ``weight`` that were active in any mask so far."""
        known = self._bits.get(weight.name)
        return weight.nnz if known is None else int(unpack_mask(known, weight.shape).sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Weight name -> packed bits, of the weights whose mask has changed; copies."""
        return {name: value.clone() for name, value in self._bits.items()}
