"""Row storage of masked weights for inference, packed again only after a weight has changed.

Shape and address of the three tensors depend on the number of kept entries alone. So a commit that
keeps counts, like any other write to the weight, changes their contents in place: no compiled graph
is specialised anew and no CUDA graph is recorded again.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from resu_compile.kernels.sparse_linear import ROW_MULTIPLE, CsrWeight, csr_pack
from resu_compile.state import MaskedWeight

_cache: WeakKeyDictionary[MaskedWeight, dict[bool, tuple[tuple[object, ...], CsrWeight]]]
_cache = WeakKeyDictionary()


def csr_of(weight: MaskedWeight, *, transposed: bool) -> CsrWeight:
    """The row storage of ``weight``, or of its transpose.

    Args:
        weight: a masked matrix (out, in); (in, out) if ``transposed``.
        transposed: pack the transpose, so that the rows are always output features.
    """
    now = weight.content_key()
    kept = _cache.setdefault(weight, {})
    found = kept.get(transposed)
    if found is not None and found[0] == now:
        return found[1]
    # tensors made in inference mode could not be written to outside of it
    with torch.inference_mode(False), torch.no_grad():
        csr = _pack(weight, transposed)
        if found is not None and _same_layout(found[1], csr):
            for old, new in zip(_tensors(found[1]), _tensors(csr), strict=True):
                old.copy_(new)
            csr = found[1]
    kept[transposed] = (now, csr)
    return csr


def _pack(weight: MaskedWeight, transposed: bool) -> CsrWeight:
    value, mask = weight.parameter.detach(), weight.mask
    if transposed:
        value, mask = value.t(), mask.t()
    csr = csr_pack(value, mask)
    if not value.is_cuda:
        return csr
    # rows are padded one by one: how many entries that takes depends on the mask, the most on nnz
    room = weight.nnz + value.shape[0] * (ROW_MULTIPLE - 1) - csr.val.numel()
    return CsrWeight(csr.ptr, F.pad(csr.col, (0, room)), F.pad(csr.val, (0, room)))


def _same_layout(old: CsrWeight, new: CsrWeight) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        for a, b in zip(_tensors(old), _tensors(new), strict=True)
    )


def _tensors(csr: CsrWeight) -> tuple[torch.Tensor, ...]:
    return csr.ptr, csr.col, csr.val
