"""What a model runs, told by one call: every matmul and convolution with a parameter as weight.

Every weight is shown, also where nothing was gained, and every parameter left out with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from resu_compile.capture import CapturedGraph, capture
from resu_compile.config import CompileConfig
from resu_compile.errors import ArgumentError
from resu_compile.passes.find_weights import WeightSite
from resu_compile.reporting import checked_controller, packed_bytes, shape_text
from resu_compile.runtime.controller import Controller
from resu_compile.selection import named_weights


@dataclass(frozen=True)
class SiteRow:
    """One place where a parameter is the weight of a matmul or convolution.

    Attributes:
        parameter: name of the parameter.
        op: the operation, as the model spells it.
        views: what lies between parameter and operation.
        shape: shape of the parameter.
        rows: rows of the other operand (batch x tokens); None if unknown or dynamic.
        sparsity: share of pruned entries of the parameter.
        kernel_dense: kernel in the DENSE phase.
        kernel_sparse: kernel in the SPARSE phase, at inference; training keeps the dense product.
        kernel_resu: kernel in the RESU phase.
        dense_ms: measured time of the dense product in milliseconds, None if not measured.
        sparse_ms: measured time of the sparse product in milliseconds, None if not measured.
        bytes_dense: bytes of the weight as a plain tensor.
        bytes_packed: bytes of its active values and mask.
        reason: why the sparse kernel is not taken; empty if it is.
    """

    parameter: str
    op: str
    views: tuple[str, ...]
    shape: tuple[int, ...]
    rows: int | None
    sparsity: float
    kernel_dense: str
    kernel_sparse: str
    kernel_resu: str
    dense_ms: float | None
    sparse_ms: float | None
    bytes_dense: int
    bytes_packed: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Every weight site of one call, and every parameter without one."""

    sites: tuple[SiteRow, ...]
    skipped: Mapping[str, str]
    graphs: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data: sites, skipped parameters, number of graphs, device."""
        return {
            "sites": [asdict(row) for row in self.sites],
            "skipped": dict(self.skipped),
            "graphs": self.graphs,
            "device": self.device,
        }

    def table(self) -> str:
        """The sites and the skipped parameters as two text tables."""
        body = [
            [
                row.parameter,
                row.op + "".join(f" <- {view}" for view in reversed(row.views)),
                shape_text(row.shape),
                row.rows,
                f"{row.sparsity:.2%}",
                f"{row.kernel_dense} / {row.kernel_sparse} / {row.kernel_resu}",
                row.dense_ms,
                row.sparse_ms,
                row.bytes_dense,
                row.bytes_packed,
                row.reason,
            ]
            for row in self.sites
        ]
        head = ["parameter", "op", "shape", "rows", "pruned", "kernel dense / sparse / resu"]
        head += ["dense ms", "sparse ms", "bytes dense", "bytes packed", "dense because"]
        sites = tabulate(body, headers=head, floatfmt=".4f")
        skipped = tabulate(self.skipped.items(), headers=["left dense", "because"])
        title = f"{len(self.sites)} weight sites in {self.graphs} graph(s), on {self.device}"
        return f"{title}\n\n{sites}\n\n{skipped}"

    def __str__(self) -> str:
        return self.table()


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Every matmul site of one call of ``model``, what it runs and what that was measured to cost.

    Args:
        model: any module, sparsified or not.
        *inputs: positional inputs of the call.
        **kwargs: keyword inputs of the call.

    Raises:
        ArgumentTypeError: ``model`` is no ``nn.Module``.
        ArgumentError: no inputs were given.
    """
    controller = checked_controller(model)
    if not inputs and not kwargs:
        raise ArgumentError("inputs: expected the inputs of one call, got none")
    inner: nn.Module = getattr(model, "_orig_mod", model)
    names = {id(weight.parameter): weight.name for weight in named_weights(inner)}
    graphs = capture(inner, *inputs, **kwargs)
    rows = [
        _explain_site(site, graph, names[id(graph.parameters[site.index])], controller)
        for graph in graphs
        for site in graph.sites
        if id(graph.parameters[site.index]) in names
    ]
    found = {row.parameter for row in rows}
    if controller is None:
        skipped = {n: "no matmul multiplies by it" for n in names.values() if n not in found}
    else:
        unused = dict.fromkeys(
            controller.weights.keys() - found, "masked, but this call multiplies nothing by it"
        )
        skipped = {**controller.skipped, **dict(sorted(unused.items()))}
    device = next((str(p.device) for p in inner.parameters()), "cpu")
    return Explanation(tuple(rows), skipped, len(graphs), device)


def _explain_site(
    site: WeightSite, graph: CapturedGraph, name: str, controller: Controller | None
) -> SiteRow:
    from resu_compile.runtime.measure import linear_times
    from resu_compile.runtime.variants import rows_and_dtype, sparse_choice, uses_cuda_graphs

    parameter = graph.parameters[site.index]
    weight = controller.weights.get(name) if controller else None
    config = controller.compile_config if controller else CompileConfig()
    rows, dtype = rows_and_dtype(site)
    dense_ms = sparse_ms = None
    buckets = 0
    reason = site.reason
    nnz = weight.nnz if weight else int(torch.count_nonzero(parameter))
    if weight is None:
        reason = reason or "no mask"
    elif site.form is not None:
        out_features, in_features = reversed(weight.shape) if site.transposed else weight.shape
        buckets = sparse_choice(site, weight, config)
        if rows is not None:
            times = linear_times(
                parameter.device,
                out_features,
                in_features,
                weight.sparsity,
                dtype or parameter.dtype,
                rows,
                cuda_graphs=uses_cuda_graphs(config),
            )
            dense_ms, sparse_ms = _measured(times.dense_ms), _measured(times.sparse_ms)
        reason = "" if buckets else _why_dense(config, weight.sparsity, sparse_ms)
    dense_bytes = parameter.numel() * parameter.element_size()
    return SiteRow(
        parameter=name,
        op=site.op,
        views=site.views,
        shape=tuple(parameter.shape),
        rows=rows,
        sparsity=weight.sparsity if weight else 0.0,
        kernel_dense="dense",
        kernel_sparse="csr" if buckets else "dense",
        kernel_resu="dense",
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
        bytes_dense=dense_bytes,
        bytes_packed=min(packed_bytes(parameter, nnz), dense_bytes) if weight else dense_bytes,
        reason=reason,
    )


def _measured(time_ms: float) -> float | None:
    return None if math.isnan(time_ms) else time_ms


def _why_dense(config: CompileConfig, sparsity: float, sparse_ms: float | None) -> str:
    threshold = config.sparse_threshold
    if threshold == 1.0:
        return "sparse_threshold=1.0 turns the sparse kernel off"
    if sparse_ms is None:
        return "no sparse kernel for this device, dtype and size"
    if threshold == "auto":
        return "dense measured faster, or too small or dense to gain"
    return f"sparsity {sparsity:.2%} is under sparse_threshold={threshold}"
