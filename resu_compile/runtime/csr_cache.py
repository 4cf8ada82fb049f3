"""CSR forms of masked weights for inference, packed again only after a weight has changed."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from resu_compile.kernels.sparse_linear import CsrWeight, csr_pack
from resu_compile.state import MaskedWeight

_Key = tuple[int, int, torch.device, int]
_cache: WeakKeyDictionary[MaskedWeight, dict[bool, tuple[_Key, CsrWeight]]] = WeakKeyDictionary()


def csr_of(weight: MaskedWeight, *, transposed: bool) -> CsrWeight:
    """The CSR form of ``weight``, or of its transpose.

    Args:
        weight: a masked matrix (out, in); (in, out) if ``transposed``.
        transposed: pack the transpose, so that the rows are always output features.
    """
    parameter = weight.parameter
    key = (parameter._version, weight.mask_version, parameter.device, parameter.data_ptr())
    kept = _cache.setdefault(weight, {})
    found = kept.get(transposed)
    if found is None or found[0] != key:
        with torch.no_grad():
            value, mask = parameter.detach(), weight.mask
            if transposed:
                value, mask = value.t(), mask.t()
            found = (key, csr_pack(value, mask))
        kept[transposed] = found
    return found[1]
