"""What a model is made of and what it runs: ``report`` without running it, ``explain`` by a call.

Both show every weight, also where nothing was gained, and every parameter left out with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resu_compile.capture import CapturedGraph, capture
from resu_compile.config import CompileConfig
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.passes.find_weights import WeightSite
from resu_compile.runtime.controller import Controller, find_controller
from resu_compile.selection import named_weights


# -- report ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    Attributes:
        name: first name of the parameter.
        shape: its shape.
        dtype: its dtype, without the ``torch.`` prefix.
        elements: number of entries.
        zeros: entries that are exactly 0 now.
        pruned: entries that its mask prunes; 0 without a mask.
        bytes_dense: bytes of the plain tensor.
        bytes_packed: bytes of the active values and one bit a weight; the dense bytes without a
            mask or where packing would not be smaller.
        note: why it has no mask; empty if it has one.
        ever_active: entries that were active in any mask so far; None without a mask.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    zeros: int
    pruned: int
    bytes_dense: int
    bytes_packed: int
    note: str = ""
    ever_active: int | None = None

    @property
    def sparsity(self) -> float:
        """Share of pruned entries."""
        return self.pruned / self.elements if self.elements else 0.0

    @property
    def ever_share(self) -> float | None:
        """Rs, the share of the entries that were active in any mask so far; None without a mask."""
        return _share(self.ever_active, self.elements)


@dataclass(frozen=True)
class Report:
    """Every parameter of a model, and the totals."""

    rows: tuple[ParameterRow, ...]
    phase: str

    @property
    def elements(self) -> int:
        """Entries of all parameters."""
        return sum(row.elements for row in self.rows)

    @property
    def zeros(self) -> int:
        """Entries that are exactly 0."""
        return sum(row.zeros for row in self.rows)

    @property
    def pruned(self) -> int:
        """Entries that masks prune."""
        return sum(row.pruned for row in self.rows)

    @property
    def ever_share(self) -> float | None:
        """Rs over the masked parameters; None if there are none.

        Source: Liu et al. 2021 (In-Time Over-Parameterization), https://arxiv.org/abs/2102.02887
        """
        masked = [row for row in self.rows if row.ever_active is not None]
        if not masked:
            return None
        ever = sum(row.ever_active for row in masked if row.ever_active is not None)
        return _share(ever, sum(row.elements for row in masked))

    @property
    def bytes_dense(self) -> int:
        """Bytes of all parameters as plain tensors."""
        return sum(row.bytes_dense for row in self.rows)

    @property
    def bytes_packed(self) -> int:
        """Bytes of all parameters with masked weights packed."""
        return sum(row.bytes_packed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: rows and totals."""
        return {
            "phase": self.phase,
            "parameters": [
                {**asdict(row), "sparsity": row.sparsity, "ever_share": row.ever_share}
                for row in self.rows
            ],
            "total": {
                "elements": self.elements,
                "zeros": self.zeros,
                "pruned": self.pruned,
                "ever_share": self.ever_share,
                "bytes_dense": self.bytes_dense,
                "bytes_packed": self.bytes_packed,
            },
        }

    def table(self) -> str:
        """The report as a text table."""
        body: list[list[Any]] = [
            [
                row.name,
                _by(row.shape),
                row.dtype,
                row.elements,
                row.zeros,
                f"{row.sparsity:.2%}",
                _percent(row.ever_share),
                row.bytes_dense,
                row.bytes_packed,
                row.note,
            ]
            for row in self.rows
        ]
        share = self.pruned / self.elements if self.elements else 0.0
        body.append(
            [
                "total",
                "",
                "",
                self.elements,
                self.zeros,
                f"{share:.2%}",
                _percent(self.ever_share),
                self.bytes_dense,
                self.bytes_packed,
                f"phase {self.phase}",
            ]
        )
        head = ["parameter", "shape", "dtype", "entries", "zeros", "pruned", "ever active"]
        head += ["bytes dense", "bytes packed", "left dense because"]
        return str(tabulate(body, headers=head))

    def __str__(self) -> str:
        return self.table()


def report(model: nn.Module) -> Report:
    """Parameters, zeros and bytes of ``model``, without running it.

    Args:
        model: any module, sparsified or not.

    Raises:
        ArgumentTypeError: ``model`` is no ``nn.Module``.
    """
    controller = _controller_of(model)
    masked = controller.weights if controller else {}
    skipped = controller.skipped if controller else {}
    if controller:
        controller.refresh()
    unknown = "new since the model was sparsified" if controller else "model is not sparsified"
    rows = []
    for weight in named_weights(getattr(model, "_orig_mod", model)):
        parameter = weight.parameter
        if is_lazy(parameter):
            continue  # lazy: neither shape nor bytes yet
        mask = masked.get(weight.name)
        dense = parameter.numel() * parameter.element_size()
        packed = _packed_bytes(parameter, mask.nnz) if mask else dense
        zeros = 0 if parameter.is_meta else parameter.numel() - int(torch.count_nonzero(parameter))
        rows.append(
            ParameterRow(
                name=weight.name,
                shape=tuple(parameter.shape),
                dtype=_dtype(parameter.dtype),
                elements=parameter.numel(),
                zeros=zeros,
                pruned=parameter.numel() - mask.nnz if mask else 0,
                bytes_dense=dense,
                bytes_packed=min(packed, dense),
                note="" if mask else skipped.get(weight.name, unknown),
                ever_active=controller.history.ever_active(mask) if controller and mask else None,
            )
        )
    return Report(tuple(rows), str(controller.phase) if controller else "none")


def _share(part: int | None, whole: int) -> float | None:
    if part is None:
        return None
    return part / whole if whole else 0.0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _packed_bytes(parameter: Tensor, nnz: int) -> int:
    return nnz * parameter.element_size() + -(-parameter.numel() // 8)


# -- explain -----------------------------------------------------------------------------------
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
                _by(row.shape),
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
    controller = _controller_of(model)
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
        bytes_packed=min(_packed_bytes(parameter, nnz), dense_bytes) if weight else dense_bytes,
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


def _controller_of(model: nn.Module) -> Controller | None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return find_controller(model)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
