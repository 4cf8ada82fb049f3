"""What a model runs, told by one call: every matmul and convolution with a parameter as weight.

Every weight is shown, also where nothing was gained, and every parameter left out with its reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import nn

from resu_compile.capture import CapturedGraph, capture
from resu_compile.config import CompileConfig
from resu_compile.errors import ArgumentError
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel, batch_bucket
from resu_compile.passes.find_weights import WeightSite
from resu_compile.reporting import checked_controller, packed_bytes, shape_text
from resu_compile.runtime.controller import Controller
from resu_compile.selection import named_weights
from resu_compile.state import MaskedWeight

if TYPE_CHECKING:
    from resu_compile.runtime.plans import Plan


@dataclass(frozen=True)
class KernelRow:
    """What computes one product at one range of batch sizes, and the times behind the choice.

    Attributes:
        rows: rows of x: the call's, or where they change the most of the range.
        kernel: name of the kernel, lower case.
        dense_ms: measured milliseconds of the dense product, None if not measured.
        sparse_ms: of the kernel that runs; where that is the dense one, of the fastest other.
    """

    rows: int
    kernel: str
    dense_ms: float | None
    sparse_ms: float | None


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
            Several, as in ``"rows to 2, tiles to 64, dense"``, where the batch size may change.
        kernel_resu: kernel in the RESU phase.
        merged_with: the other parameters of the product in the SPARSE phase, where weights of one
            input are multiplied as one; kernel and times are then those of all together.
        choices: the kernel of each batch size in question, with its times.
        times_from: where the times come from: ``"measured"`` now, ``"cache"`` of an earlier
            measurement, ``"shipped"`` with the package; else why there are none.
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
    merged_with: tuple[str, ...]
    choices: tuple[KernelRow, ...]
    times_from: str
    bytes_dense: int
    bytes_packed: int
    reason: str

    @property
    def dense_ms(self) -> float | None:
        """Time of the dense product where the batch size is known, None if not measured."""
        return self.choices[0].dense_ms if len(self.choices) == 1 else None

    @property
    def sparse_ms(self) -> float | None:
        """The same of what is weighed against it."""
        return self.choices[0].sparse_ms if len(self.choices) == 1 else None


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
                _lines([choice.rows for choice in row.choices]) or row.rows,
                f"{row.sparsity:.2%}",
                f"{row.kernel_dense} / {row.kernel_sparse} / {row.kernel_resu}"
                + "".join(f"\nas one with {other}" for other in row.merged_with),
                _lines([choice.dense_ms for choice in row.choices]),
                _lines([choice.sparse_ms for choice in row.choices]),
                row.times_from,
                row.bytes_dense,
                row.bytes_packed,
                row.reason,
            ]
            for row in self.sites
        ]
        head = ["parameter", "op", "shape", "rows", "pruned", "kernel dense / sparse / resu"]
        head += ["dense ms", "sparse ms", "times", "bytes dense", "bytes packed", "dense because"]
        right = ("right",)
        align = ("left",) * 3 + right * 2 + ("left",) + right * 2 + ("left",) + right * 2
        sites = tabulate(body, headers=head, colalign=(*align, "left") if body else None)
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
    rows = [row for graph in graphs for row in _explain_graph(graph, names, controller)]
    found = {row.parameter for row in rows}
    if controller is None:
        skipped = {n: "no matmul multiplies by it" for n in names.values() if n not in found}
    else:
        unused = dict.fromkeys(
            controller.weights.keys() - found,
            "masked, but no captured graph of this call multiplies by it: it is unused, or runs "
            "eagerly beside a graph break",
        )
        skipped = {**controller.skipped, **dict(sorted(unused.items()))}
    device = next((str(p.device) for p in inner.parameters()), "cpu")
    return Explanation(tuple(rows), skipped, len(graphs), device)


def _explain_graph(
    graph: CapturedGraph, names: Mapping[int, str], controller: Controller | None
) -> Iterator[SiteRow]:
    """The sites of one graph, with the products that replace them."""
    from resu_compile.runtime.sparse_products import choose_products

    of_site = {
        position: names[id(graph.parameters[site.index])]
        for position, site in enumerate(graph.sites)
        if id(graph.parameters[site.index]) in names
    }
    config = controller.compile_config if controller else CompileConfig()
    masked = controller.weights if controller else {}
    weights = {
        graph.sites[position].index: masked[name]
        for position, name in of_site.items()
        if name in masked
    }
    products = {
        position: product
        for product in choose_products(graph.gm, graph.sites, weights, config)
        for position in product.sites
    }
    for position, name in of_site.items():
        product = products.get(position)
        others = [i for i in product.sites if i != position] if product else []
        yield _explain_site(
            graph.sites[position],
            name,
            graph.parameters[graph.sites[position].index],
            masked.get(name),
            config,
            product.plan if product else None,
            tuple(of_site[i] for i in others),
        )


def _explain_site(
    site: WeightSite,
    name: str,
    parameter: nn.Parameter,
    weight: MaskedWeight | None,
    config: CompileConfig,
    plan: Plan | None,
    merged_with: tuple[str, ...],
) -> SiteRow:
    from resu_compile.runtime.sparse_products import rows_and_dtype, sparse_plan

    rows, _ = rows_and_dtype(site)
    reason = site.reason
    nnz = weight.nnz if weight else int(torch.count_nonzero(parameter))
    if weight is None:
        reason = reason or "no mask"
    elif site.form is not None:
        plan = plan or sparse_plan(site, weight, config)  # a product only where not dense
        reason = _why_dense(plan)
    choices = _choices(plan, rows) if plan else ()
    dense_bytes = parameter.numel() * parameter.element_size()
    return SiteRow(
        parameter=name,
        op=site.op,
        views=site.views,
        shape=tuple(parameter.shape),
        rows=rows,
        sparsity=weight.sparsity if weight else 0.0,
        kernel_dense="dense",
        kernel_sparse=_kernels_text(choices),
        kernel_resu="dense",
        merged_with=merged_with,
        choices=choices,
        times_from=plan.source if plan else "",
        bytes_dense=dense_bytes,
        bytes_packed=min(packed_bytes(parameter, nnz), dense_bytes) if weight else dense_bytes,
        reason=reason,
    )


def _choices(plan: Plan, rows: int | None) -> tuple[KernelRow, ...]:
    """The plan at ``rows`` rows of x, or at every batch size."""
    if rows is not None:
        return (_choice(plan, batch_bucket(rows), rows),)
    return tuple(_choice(plan, i, most) for i, most in enumerate(BUCKET_ROWS))


def _choice(plan: Plan, bucket: int, rows: int) -> KernelRow:
    kernel, times = plan.kernels[bucket], plan.times_ms.get(bucket, {})
    if kernel is Kernel.DENSE:
        sparse = [ms for other, ms in times.items() if other is not Kernel.DENSE]
        sparse_ms = min(sparse, default=None)
    else:
        sparse_ms = times.get(kernel)
    return KernelRow(rows, kernel.name.lower(), times.get(Kernel.DENSE), sparse_ms)


def _kernels_text(choices: Sequence[KernelRow]) -> str:
    """Each kernel with the largest batch that it runs, in order; the last runs all larger ones."""
    runs = [
        (kernel, max(choice.rows for choice in run))
        for kernel, run in itertools.groupby(choices, lambda choice: choice.kernel)
    ]
    if not runs:
        return "dense"
    return ", ".join([*(f"{kernel} to {rows}" for kernel, rows in runs[:-1]), runs[-1][0]])


def _lines(values: Sequence[int | float | None]) -> str:
    """One value a line; milliseconds with four digits behind the point."""
    if all(value is None for value in values):
        return ""
    return "\n".join(
        "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        for value in values
    )


def _why_dense(plan: Plan) -> str:
    """Why no sparse kernel runs at any batch size; empty if one does."""
    if not plan.is_dense:
        return ""
    return "no sparse kernel measured faster" if plan.times_ms else plan.source
