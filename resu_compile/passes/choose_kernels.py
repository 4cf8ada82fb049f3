"""Give each matmul by a committed weight the kernel that runs fastest on one device.

Before:

    %weight = get_attr[target=fc.weight]
    %y = aten.linear(%x, %weight, %fc_bias)

After, where the sparse path was measured faster in the batch buckets 0b11, and as before elsewhere:

    %weight = get_attr[target=fc.weight]
    %ptr, %col, %val = get_attr[target=fc.weight_csr_ptr], ...
    %y = resu_compile.sparse_linear(%x, %weight, %ptr, %col, %val, %fc_bias, 3)

``x @ w.t()``, ``x @ w``, ``mm`` and ``addmm`` take part as ``linear`` does; a convolution or a
``bmm`` has no sparse kernel and stays dense. Running the pass again, for another device, revises
its choices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from resu_compile.passes.base import PassReport

_aten = torch.ops.aten
_TRANSPOSES = (_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default)
_CSR_PARTS = ("ptr", "col", "val")


@dataclass(frozen=True)
class _Site:
    """``x @ weight.T + bias``; ``transposed``: the parameter is stored as ``[in, out]``."""

    node: fx.Node
    x: fx.Node
    read: fx.Node
    transposed: bool
    bias: fx.Node | None

    @property
    def csr_name(self) -> str:
        return f"{self.read.target}_csr_t" if self.transposed else f"{self.read.target}_csr"

    @property
    def rows(self) -> int | None:
        """Rows of ``x`` if they are static, else None."""
        value = self.x.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        rows = 1
        for size in value.shape[:-1]:
            if not isinstance(size, int):
                return None
            rows *= size
        return rows


def choose_kernels(
    gm: fx.GraphModule,
    sparsities: Mapping[str, float],
    device: torch.device,
    threshold: float | Literal["auto"],
) -> PassReport:
    """Choose sparse or dense for every matmul by a named weight of ``gm``, in place.

    Args:
        gm: ATen graph; weights are dense parameters on ``device``. The compressed rows of a weight
            that goes sparse become buffers beside it, named after it.
        sparsities: parameter name -> share of zeros in [0, 1].
        device: where the graph runs.
        threshold: ``"auto"`` takes the sparse path where it was measured faster; a number forces it
            from that sparsity on, 1.0 turns it off.

    Returns:
        The report, by weight name.
    """
    start = time.perf_counter()
    report = PassReport("choose_kernels")
    seen: set[str] = set()
    released: list[fx.Node] = []
    _drop_rows(gm)
    for node in list(gm.graph.nodes):
        site = _linear_site(node)
        if site is None or site.read.target not in sparsities:
            continue
        name = str(site.read.target)
        seen.add(name)
        weight = gm.get_parameter(name).detach()
        weight = weight.t() if site.transposed else weight  # (out, in)
        buckets = _sparse_buckets(weight, sparsities[name], device, site.rows, threshold)
        before = site.node.all_input_nodes
        if buckets:
            _make_sparse(gm, site, weight, buckets)
            report.rewritten[name] = f"sparse_linear in batch buckets {buckets:#b} on {device}"
        else:
            _make_dense(gm, site)
            report.skipped[name] = (
                "dense: threshold is 1.0"
                if threshold == 1.0
                else f"dense: no batch size where sparse is taken on {device}"
            )
        released += before
    for name in sorted(sparsities.keys() - seen):
        report.skipped[name] = "dense: not used by a plain matmul"
    _erase_unused(gm.graph, released)
    gm.graph.lint()
    gm.recompile()
    report.elapsed_ms = (time.perf_counter() - start) * 1e3
    return report


# -- sites -----------------------------------------------------------------------------------
def _linear_site(node: fx.Node) -> _Site | None:
    """``node`` as ``x @ weight.T + bias``, or None."""
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
    if _is_sparse(node):
        return _site(node, args[0], args[1], False, args[5])
    return None


def _is_sparse(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "_qualified_op_name", "") == "resu_compile::sparse_linear"


def _site(node: fx.Node, x: object, weight: object, transposed: bool, bias: object) -> _Site | None:
    """The site, if ``weight`` is a 2-D parameter or its transpose."""
    while isinstance(weight, fx.Node) and weight.target in _TRANSPOSES:
        if _dim(weight.args[0]) != 2 or not _swaps(weight):
            return None
        weight, transposed = weight.args[0], not transposed
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or _dim(weight) != 2:
        return None
    if not isinstance(x, fx.Node) or _dim(x) < 1:
        return None
    return _Site(node, x, weight, transposed, bias if isinstance(bias, fx.Node) else None)


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


def _sparse_buckets(
    weight: Tensor,
    sparsity: float,
    device: torch.device,
    rows: int | None,
    threshold: float | Literal["auto"],
) -> int:
    if threshold == 1.0:  # off: not even the measuring code is imported
        return 0
    from resu_compile.runtime.measure import sparse_buckets

    out_features, in_features = weight.shape
    return sparse_buckets(
        device, out_features, in_features, sparsity, weight.dtype, rows, threshold
    )


# -- rewriting -------------------------------------------------------------------------------
def _oriented(gm: fx.GraphModule, site: _Site) -> fx.Node:
    """The weight as ``[out, in]``."""
    if not site.transposed:
        return site.read
    turned = gm.graph.call_function(_aten.t.default, (site.read,))
    turned.meta = {**site.read.meta, "val": site.read.meta["val"].t()}
    return turned


def _make_sparse(gm: fx.GraphModule, site: _Site, weight: Tensor, buckets: int) -> None:
    from resu_compile.kernels.sparse_linear import csr_pack

    path, _, attribute = site.csr_name.rpartition(".")
    owner = gm.get_submodule(path)
    if not hasattr(owner, f"{attribute}_ptr"):
        packed = csr_pack(weight)
        for part in _CSR_PARTS:
            owner.register_buffer(f"{attribute}_{part}", getattr(packed, part))
    with gm.graph.inserting_before(site.node):
        oriented = _oriented(gm, site)
        parts = [gm.graph.get_attr(f"{site.csr_name}_{part}") for part in _CSR_PARTS]
    site.node.target = torch.ops.resu_compile.sparse_linear.default
    site.node.args = (site.x, oriented, *parts, site.bias, buckets)
    site.node.kwargs = {}


def _make_dense(gm: fx.GraphModule, site: _Site) -> None:
    if not _is_sparse(site.node):
        return
    with gm.graph.inserting_before(site.node):
        oriented = _oriented(gm, site)
    site.node.target = _aten.linear.default
    site.node.args = (site.x, oriented, site.bias)


def _erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those of ``nodes``, and what they read, that are reads or transposes without a user."""
    erased: set[fx.Node] = set()
    while nodes:
        node = nodes.pop()
        if node in erased or node.users:
            continue
        if node.op == "get_attr" or node.target in _TRANSPOSES:
            nodes += node.all_input_nodes
            erased.add(node)
            graph.erase_node(node)


def _drop_rows(gm: fx.GraphModule) -> None:
    """Delete the compressed rows of an earlier choice; their format is that of its device."""
    for node in gm.graph.nodes:
        if not _is_sparse(node):
            continue
        for part in node.args[2:5]:
            path, _, attribute = part.target.rpartition(".")
            owner = gm.get_submodule(path)
            if attribute in owner._buffers:  # two matmuls may share one weight
                delattr(owner, attribute)
