"""Products ``x @ weight.T + bias`` of an ATen graph whose weight is a parameter.

``linear``, ``x @ w.t()``, ``x @ w``, ``mm`` and ``addmm`` are such products; a convolution or a
``bmm`` is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
TRANSPOSES = (_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default)


@dataclass(frozen=True)
class LinearSite:
    """``x @ weight.T + bias``; ``transposed``: the parameter is stored as ``[in, out]``."""

    node: fx.Node
    x: fx.Node
    read: fx.Node
    transposed: bool
    bias: fx.Node | None

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return str(self.read.target)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        first, second = self.read.meta["val"].shape
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the product."""
        dtype: torch.dtype = self.x.meta["val"].dtype
        return dtype

    @property
    def rows(self) -> int | None:
        """Rows of ``x`` if they are static, else None."""
        rows = 1
        for size in self.x.meta["val"].shape[:-1]:
            if not isinstance(size, int):
                return None
            rows *= size
        return rows


def find_linear_sites(graph: fx.Graph) -> list[LinearSite]:
    """All such products of ``graph``, in order."""
    return [site for node in graph.nodes if (site := _linear_site(node)) is not None]


def _linear_site(node: fx.Node) -> LinearSite | None:
    args = node.args
    if node.op != "call_function":
        return None
    if node.target is _aten.linear.default:
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        return _site(node, args[0], args[1], False, bias)
    if node.target in (_aten.mm.default, _aten.matmul.default):
        return _site(node, args[0], args[1], True, None)
    if node.target is _aten.addmm.default and not node.kwargs and _is_bias(args[0], node):
        return _site(node, args[1], args[2], True, args[0])
    return None


def _site(
    node: fx.Node, x: object, weight: object, transposed: bool, bias: object
) -> LinearSite | None:
    """The site, if ``weight`` is a 2-D parameter or its transpose."""
    while isinstance(weight, fx.Node) and weight.target in TRANSPOSES:
        if _dim(weight.args[0]) != 2 or not _swaps(weight):
            return None
        weight, transposed = weight.args[0], not transposed
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or _dim(weight) != 2:
        return None
    if not isinstance(x, fx.Node) or _dim(x) < 1:
        return None
    return LinearSite(node, x, weight, transposed, bias if isinstance(bias, fx.Node) else None)


def _swaps(node: fx.Node) -> bool:
    """Whether a transpose of a 2-D tensor swaps its two dimensions."""
    if node.target is _aten.transpose.int:
        return int(node.args[1]) % 2 != int(node.args[2]) % 2  # type: ignore[arg-type]
    if node.target is _aten.permute.default:
        return [int(d) % 2 for d in node.args[1]] == [1, 0]  # type: ignore[arg-type, union-attr]
    return True


def _is_bias(bias: object, node: fx.Node) -> bool:
    """Whether ``bias`` is a vector as long as a row of what ``node`` gives."""
    return _dim(bias) == 1 and bias.meta["val"].shape[0] == node.meta["val"].shape[-1]  # type: ignore[attr-defined]


def _dim(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else -1
