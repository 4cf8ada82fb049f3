"""Analysis: which matmuls and convolutions of a graph multiply by which input, however spelled.

    def forward(x, w, b):                        WeightSite(weight=w, op="addmm",
        return torch.addmm(b, x, w.t())   ==>        views=("t",), form="linear")

Nothing is rewritten. A weight is followed through views (t, permute, reshape, slice, chunk, expand)
and into the bodies of higher-order ops such as activation checkpointing.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from resu_compile.passes.base import PassReport

Form = Literal["linear", "matmul_right", "matmul_left", "addmm"]

_MATMULS: dict[Any, str] = {
    F.linear: "linear",
    torch._C._nn.linear: "linear",
    torch.matmul: "matmul",
    operator.matmul: "matmul",
    torch.mm: "mm",
    torch.mv: "mv",
    torch.bmm: "bmm",
    torch.addmm: "addmm",
    torch.baddbmm: "baddbmm",
    torch.addbmm: "addbmm",
    torch.chain_matmul: "chain_matmul",
    torch.einsum: "einsum",
    torch.functional.einsum: "einsum",
    torch.tensordot: "tensordot",
    torch.functional.tensordot: "tensordot",
    F.bilinear: "bilinear",
    torch.bilinear: "bilinear",
    F.multi_head_attention_forward: "multi_head_attention",
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    torch.conv_transpose1d: "conv_transpose1d",
    torch.conv_transpose2d: "conv_transpose2d",
    torch.conv_transpose3d: "conv_transpose3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
    torch._VF.lstm: "lstm",
    torch._VF.gru: "gru",
}
for _name in ("_grouped_mm", "_scaled_mm"):  # grouped experts; not in every release
    for _holder in (torch, F, torch._C._nn):
        if hasattr(_holder, _name):
            _MATMULS[getattr(_holder, _name)] = _name.strip("_")
if hasattr(F, "grouped_mm"):
    _MATMULS[F.grouped_mm] = "grouped_mm"

_MATMUL_METHODS = {
    "matmul": "matmul",
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "mm": "mm",
    "mv": "mv",
    "bmm": "bmm",
    "addmm": "addmm",
    "addmm_": "addmm",
    "baddbmm": "baddbmm",
    "addbmm": "addbmm",
}

_VIEWS = frozenset(
    "t transpose swapaxes swapdims permute adjoint reshape view view_as reshape_as flatten unflatten "
    "squeeze unsqueeze expand expand_as narrow select chunk split tensor_split unbind contiguous "
    "clone detach alias to type type_as float half bfloat16 double movedim moveaxis index_select "
    "unfold repeat ravel cuda cpu broadcast_to requires_grad_ slice "
    "getitem getattr stack cat concat".split()
)
_TRANSPOSES = frozenset("t T mT transpose swapaxes swapdims permute adjoint".split())
_KEEPS = frozenset("contiguous clone detach alias requires_grad_".split())


@dataclass(frozen=True)
class WeightSite:
    """One place where a graph input is the weight of a matmul or convolution.

    Attributes:
        weight: name of the placeholder node.
        index: its position among the placeholders.
        node: the node that multiplies; inside a higher-order op, the node of its body.
        op: name of the operation.
        views: what lies between the weight and the operation, in order.
        form: how a sparse kernel for ``y = x W^T`` could stand in; None if it cannot.
        transposed: True if W of ``y = x W^T`` is the transpose of the parameter.
        reason: why ``form`` is None.
    """

    weight: str
    index: int
    node: fx.Node
    op: str
    views: tuple[str, ...] = ()
    form: Form | None = None
    transposed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class _Lineage:
    """A value that is a view of the placeholder ``index``."""

    index: int
    views: tuple[str, ...] = ()
    transposed: bool = False
    whole: bool = True


@dataclass
class _Search:
    module: torch.nn.Module
    names: list[str]
    sites: list[WeightSite] = field(default_factory=list)


def find_weights(
    gm: fx.GraphModule, candidates: Collection[int] | None = None
) -> tuple[list[WeightSite], PassReport]:
    """Find every site whose weight is one of the placeholders.

    Args:
        gm: a graph as Dynamo captures it, parameters lifted to placeholders.
        candidates: positions of the placeholders that count as weights; None means all with two
            dimensions or more.

    Returns:
        The sites in graph order, and a report: a found weight with its ops, every other candidate
        with its reason.
    """
    started = time.perf_counter()
    placeholders = gm.graph.find_nodes(op="placeholder")
    names = [node.name for node in placeholders]
    if candidates is None:
        candidates = [i for i, node in enumerate(placeholders) if _dims(node) >= 2]
    lineage = {placeholders[i]: _Lineage(i) for i in candidates}
    search = _Search(gm, names)
    used = _walk(gm.graph, lineage, search, nested=False)
    report = PassReport("find_weights")
    for site in search.sites:
        report.rewritten[site.weight] = ", ".join(
            dict.fromkeys(s.op for s in search.sites if s.index == site.index)
        )
    for index in candidates:
        if names[index] not in report.rewritten:
            others = used.get(index)
            report.skipped[names[index]] = (
                f"used by {', '.join(sorted(others))}, not as the weight of a matmul"
                if others
                else "not used in this graph"
            )
    report.elapsed_ms = (time.perf_counter() - started) * 1e3
    return search.sites, report


def _walk(
    graph: fx.Graph, lineage: dict[fx.Node, _Lineage], search: _Search, *, nested: bool
) -> dict[int, set[str]]:
    used: dict[int, set[str]] = {}
    for node in graph.nodes:
        parents = [arg for arg in node.all_input_nodes if arg in lineage]
        if not parents or node.op == "output":
            continue
        op = _matmul_name(node)
        if op is not None:
            for parent in dict.fromkeys(parents):
                search.sites.append(_site(node, op, parent, lineage[parent], search, nested))
            continue
        bodies = _bodies(node, search.module)
        if bodies:
            for body, operands in bodies:
                inner = dict(_enter(body, operands, lineage))
                _walk(body.graph, inner, _Search(body, search.names, search.sites), nested=True)
            continue
        name = _name(node)
        if name in _VIEWS or name in _TRANSPOSES:
            lineage[node] = _through(node, name, lineage[parents[0]])
        else:
            for parent in parents:
                used.setdefault(lineage[parent].index, set()).add(name)
    return used


def _through(node: fx.Node, name: str, parent: _Lineage) -> _Lineage:
    label = str(node.args[1]) if name == "getattr" else name
    views = (*parent.views, label)
    if label in _TRANSPOSES and _dims(node) == 2 and parent.whole and _swaps(node, label):
        return _Lineage(parent.index, views, not parent.transposed, whole=True)
    if label in _KEEPS:
        return _Lineage(parent.index, views, parent.transposed, parent.whole)
    return _Lineage(parent.index, views, parent.transposed, whole=False)


def _swaps(node: fx.Node, label: str) -> bool:
    """True if a transposing call on a matrix really swaps its two dimensions."""
    if label in ("t", "T", "mT", "adjoint"):
        return True
    dims: list[Any] = []
    for arg in (*node.args[1:], *node.kwargs.values()):
        dims.extend(arg if isinstance(arg, (tuple, list)) else [arg])
    if not all(isinstance(dim, int) for dim in dims) or len(dims) != 2:
        return False
    positive = [dim % 2 for dim in dims]
    return positive == [1, 0] if label == "permute" else positive[0] != positive[1]


def _site(
    node: fx.Node, op: str, parent: fx.Node, line: _Lineage, search: _Search, nested: bool
) -> WeightSite:
    form, transposed, reason = _form(node, op, parent, line)
    if nested and form is not None:
        form, reason = None, "inside the body of a higher-order op"
    return WeightSite(
        search.names[line.index], line.index, node, op, line.views, form, transposed, reason
    )


def _form(node: fx.Node, op: str, parent: fx.Node, line: _Lineage) -> tuple[Form | None, bool, str]:
    """(form, W of y = x W^T is the parameter's transpose, reason if there is no form)."""
    if op not in ("linear", "matmul", "mm", "addmm"):
        return None, False, f"{op} has no sparse kernel"
    if not line.whole or _dims(parent) != 2:
        return None, False, f"weight is taken apart ({', '.join(line.views) or 'not a matrix'})"
    # operands by position or name, in the order of each op's signature
    names = {
        "linear": ("input", "weight", "bias"),
        "matmul": ("input", "other"),
        "mm": ("input", "mat2"),
        "addmm": ("input", "mat1", "mat2"),
    }[op]
    values = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    where = [name for name, value in values.items() if value is parent]
    if len(where) != 1:
        return None, False, "the weight is both operands"
    place = where[0]
    if op == "linear" and place == "weight":
        return "linear", line.transposed, ""
    if op == "addmm":
        plain = values.get("beta", 1) == 1 and values.get("alpha", 1) == 1
        bias = values["input"]
        if place == "mat2" and plain and isinstance(bias, fx.Node) and _dims(bias) == 1:
            return "addmm", not line.transposed, ""
        return None, False, "addmm with the weight on the left, scaled, or with a matrix to add"
    if op in ("matmul", "mm") and place in ("other", "mat2") and _dims(values["input"]) >= 2:
        return "matmul_right", not line.transposed, ""
    if op in ("matmul", "mm") and place == "input":
        other = values.get("other", values.get("mat2"))
        if isinstance(other, fx.Node) and _dims(other) >= 2:
            return "matmul_left", line.transposed, ""
    return None, False, "operand is a vector"


def _matmul_name(node: fx.Node) -> str | None:
    if node.op == "call_function":
        found = _MATMULS.get(node.target)
        if found is None and isinstance(node.target, torch._ops.OpOverload):
            base = node.target._schema.name.split("::")[-1]
            known = {"convolution", "linear", "mm", "bmm", "addmm", "baddbmm", "matmul", "einsum"}
            found = base if base in known else None
        return found
    if node.op == "call_method":
        return _MATMUL_METHODS.get(str(node.target))
    return None


def _bodies(
    node: fx.Node, module: torch.nn.Module
) -> list[tuple[fx.GraphModule, list[fx.Node | Any]]]:
    """Bodies of a higher-order op with the operands they get, where the two match by count."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    flat: list[Any] = []
    for arg in node.args:
        flat.extend(arg if isinstance(arg, (tuple, list)) else [arg])
    bodies = [a for a in flat if isinstance(a, fx.Node) and a.op == "get_attr"]
    operands = [a for a in flat if not (isinstance(a, fx.Node) and a.op == "get_attr")]
    found = []
    for body_node in bodies:
        body = getattr(module, str(body_node.target), None)
        if isinstance(body, fx.GraphModule):
            count = len(body.graph.find_nodes(op="placeholder"))
            found.append((body, operands[len(operands) - count :]))
    return found


def _enter(
    body: fx.GraphModule, operands: list[Any], lineage: dict[fx.Node, _Lineage]
) -> list[tuple[fx.Node, _Lineage]]:
    placeholders = body.graph.find_nodes(op="placeholder")
    return [
        (inner, lineage[outer])
        for inner, outer in zip(placeholders, operands, strict=False)
        if isinstance(outer, fx.Node) and outer in lineage
    ]


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    target: Callable[..., Any] | str = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target)).lstrip("_")


def _dims(node: Any) -> int:
    """Dimensions of the tensor that ``node`` yields; -1 if it is none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else node
    return value.dim() if isinstance(value, Tensor) else -1
