"""Analysis: which matmuls and convolutions of a graph multiply by which input, however spelled.

    def forward(x, w, b):                        WeightSite(weight="w", op="addmm", views=("t",),
        return torch.addmm(b, x, w.t())   ==>        form="matmul_right", x=x, matrix=t, bias=b)

Nothing is rewritten. A weight is followed through views (t, permute, reshape, slice, chunk,
expand), casts and concatenations, and into the bodies of higher-order ops such as activation
checkpointing. An input that is only added, or that a linear layer is applied to, is no weight.
"""

from __future__ import annotations

import inspect
import operator
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

from resu_compile.passes.base import PassReport
from resu_compile.passes.fx_utils import VIEWS, call_name, changed_in_place, dims, first_operand

Form = Literal["linear", "matmul_right", "matmul_left"]

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "linear": (F.linear, torch._C._nn.linear),
    "matmul": (torch.matmul, operator.matmul, torch.linalg.matmul),
    "mm": (torch.mm,),
    "mv": (torch.mv,),
    "bmm": (torch.bmm,),
    "addmm": (torch.addmm,),
    "addmv": (torch.addmv,),
    "baddbmm": (torch.baddbmm,),
    "addbmm": (torch.addbmm,),
    "inner": (torch.inner,),
    "chain_matmul": (torch.chain_matmul, torch.linalg.multi_dot),
    "einsum": (torch.einsum, torch.functional.einsum),
    "tensordot": (torch.tensordot, torch.functional.tensordot),
    "bilinear": (F.bilinear, torch.bilinear),
    "multi_head_attention": (F.multi_head_attention_forward, torch._native_multi_head_attention),
    "transformer_encoder_layer": (torch._transformer_encoder_layer_fwd,),
    "conv1d": (torch.conv1d, F.conv1d),
    "conv2d": (torch.conv2d, F.conv2d),
    "conv3d": (torch.conv3d, F.conv3d),
    "conv_transpose1d": (torch.conv_transpose1d, F.conv_transpose1d),
    "conv_transpose2d": (torch.conv_transpose2d, F.conv_transpose2d),
    "conv_transpose3d": (torch.conv_transpose3d, F.conv_transpose3d),
    "convolution": (torch.convolution, torch._convolution),
    "lstm": (torch.lstm, torch._VF.lstm),
    "gru": (torch.gru, torch._VF.gru),
    "rnn_tanh": (torch.rnn_tanh, torch._VF.rnn_tanh),
    "rnn_relu": (torch.rnn_relu, torch._VF.rnn_relu),
    # grouped experts and scaled products; not in every release
    "grouped_mm": tuple(
        getattr(holder, name)
        for name in ("grouped_mm", "_grouped_mm")
        for holder in (torch, F)
        if hasattr(holder, name)
    ),
    "scaled_mm": (torch._scaled_mm,),
}
_MATMULS = {function: op for op, functions in _FUNCTIONS.items() for function in functions}
_METHODS = {
    name: op
    for op in ("matmul", "mm", "mv", "bmm", "addmm", "addmv", "baddbmm", "addbmm", "inner")
    for name in (op, f"{op}_", f"__{op}__")
}

_CONV = ("input", "weight", "bias")
# operands by name, in the order of each signature
_NAMES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "bilinear": ("input1", "input2", "weight", "bias"),
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "addmm": ("input", "mat1", "mat2"),
    "addmv": ("input", "mat", "vec"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addbmm": ("input", "batch1", "batch2"),
    "multi_head_attention": tuple(inspect.signature(F.multi_head_attention_forward).parameters),
    "convolution": _CONV,
    **{op: _CONV for op in _FUNCTIONS if op.startswith("conv") and op != "convolution"},
}
# whole layers, whose vectors are biases and scales
_LAYERS = frozenset({"transformer_encoder_layer", "lstm", "gru", "rnn_tanh", "rnn_relu"})
_PROJECTIONS = tuple(name for name in _NAMES["multi_head_attention"] if name.endswith("_weight"))

_OTHERS_MATMULS = frozenset({"mm", "bmm", "addmm", "matmul", "gemm", "linear", "einsum"})

_TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "adjoint"})
_KEEPS = frozenset(
    {"contiguous", "clone", "detach", "alias", "get_data_attr", "data", "requires_grad_"}
)
_JOINS = frozenset({"stack", "cat", "concat", "concatenate", "hstack", "vstack"})


@dataclass(frozen=True)
class WeightSite:
    """One place where a graph input is the weight of a matmul or convolution.

    Attributes:
        weight: name of the placeholder node.
        index: its position among the placeholders.
        node: the node that multiplies; inside a higher-order op, the node of its body.
        op: name of the operation.
        views: what lies between the weight and the operation, in order.
        form: how a sparse kernel for ``y = x W^T + b`` could stand in, None if it cannot:
            ``"linear"`` has W itself as ``matrix``, ``"matmul_right"`` x @ matrix with its
            transpose, ``"matmul_left"`` matrix @ x with W itself and x and y transposed.
        transposed: True if W is the transpose of the parameter.
        x: the other operand, if there is a form.
        matrix: the operand that is a view of the weight, if there is a form.
        bias: a vector to add, if there is a form and a bias.
        reason: why ``form`` is None.
    """

    weight: str
    index: int
    node: fx.Node
    op: str
    views: tuple[str, ...] = ()
    form: Form | None = None
    transposed: bool = False
    x: fx.Node | None = None
    matrix: fx.Node | None = None
    bias: fx.Node | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Lineage:
    """A value that comes from the placeholder ``index``.

    ``whole`` says that it is the matrix itself or, if ``transposed``, its transpose.
    """

    index: int
    views: tuple[str, ...] = ()
    transposed: bool = False
    whole: bool = True


@dataclass
class _Search:
    names: list[str]
    written: frozenset[int]
    sites: list[WeightSite] = field(default_factory=list)
    used: dict[int, set[str]] = field(default_factory=dict)


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
        candidates = [i for i, node in enumerate(placeholders) if dims(node) >= 2]
    search = _Search(names, frozenset(changed_in_place(gm.graph)))
    _walk(gm, {placeholders[i]: (_Lineage(i),) for i in candidates}, search, nested=False)
    report = PassReport("find_weights")
    for site in search.sites:
        report.rewritten[site.weight] = ", ".join(
            dict.fromkeys(s.op for s in search.sites if s.index == site.index)
        )
    for index in candidates:
        if names[index] not in report.rewritten:
            others = search.used.get(index)
            report.skipped[names[index]] = (
                f"used by {', '.join(sorted(others))}, not as the weight of a matmul"
                if others
                else "not used in this graph"
            )
    report.elapsed_ms = (time.perf_counter() - started) * 1e3
    return search.sites, report


def _walk(
    gm: fx.GraphModule,
    lineage: dict[fx.Node, tuple[_Lineage, ...]],
    search: _Search,
    *,
    nested: bool,
) -> None:
    for node in gm.graph.nodes:
        parents = [arg for arg in node.all_input_nodes if arg in lineage]
        if not parents or node.op == "output":
            continue
        op = matmul_name(node)
        name = call_name(node)
        bodies = _bodies(node, gm)
        if op is not None:
            multiplied = _multiplied(node, op, lineage)
            for parent in multiplied:
                for line in lineage[parent]:
                    search.sites.append(_site(node, op, parent, line, search, nested))
            parents = [parent for parent in parents if parent not in multiplied]
        elif bodies:
            for body, operands in bodies:
                _walk(body, _enter(body, operands, lineage), search, nested=True)
            continue
        elif name in VIEWS and first_operand(node) in lineage:
            lineage[node] = tuple(_through(node, name, line) for line in lineage[parents[0]])
            continue
        elif name in _JOINS and len(parents) == len(node.all_input_nodes):
            lineage[node] = tuple(
                _through(node, name, line) for parent in parents for line in lineage[parent]
            )
            continue
        for parent in parents:
            for line in lineage[parent]:
                search.used.setdefault(line.index, set()).add(name)


def _multiplied(
    node: fx.Node, op: str, lineage: dict[fx.Node, tuple[_Lineage, ...]]
) -> list[fx.Node]:
    """The operands of ``node`` that come from a candidate and are its weights."""
    values = _operands(node, op)
    if op == "linear" and values.get("weight") not in lineage:
        places: Iterable[str] = ("input",)  # W x^T, spelled F.linear(W, x)
    elif op in ("linear", "bilinear") or op.startswith("conv"):
        places = ("weight",)  # what a layer is applied to is an activation, parameter or not
    elif op == "multi_head_attention":
        places = _PROJECTIONS
    elif op in _NAMES:
        places = _NAMES[op][1:] if len(_NAMES[op]) == 3 else _NAMES[op]  # addmm adds its first
    else:
        found = [arg for arg in node.all_input_nodes if arg in lineage]
        return [arg for arg in found if dims(arg) != 1] if op in _LAYERS else found
    return list(dict.fromkeys(v for v in map(values.get, places) if v in lineage))


def _operands(node: fx.Node, op: str) -> dict[str, Any]:
    return dict(zip(_NAMES.get(op, ()), node.args, strict=False)) | dict(node.kwargs)


# -- views -------------------------------------------------------------------------------------
def _through(node: fx.Node, name: str, parent: _Lineage) -> _Lineage:
    views = (*parent.views, name)
    if name in _TRANSPOSES and dims(node) == 2 and parent.whole and _swaps(node, name):
        return _Lineage(parent.index, views, not parent.transposed)
    if name in _KEEPS:
        return _Lineage(parent.index, views, parent.transposed, parent.whole)
    return _Lineage(parent.index, views, parent.transposed, whole=False)


def _swaps(node: fx.Node, name: str) -> bool:
    """True if a transposing call on a matrix really swaps its two dimensions."""
    if name in ("t", "T", "mT", "adjoint"):
        return True
    values: list[Any] = []
    for arg in (*node.args[1:], *(v for k, v in node.kwargs.items() if k not in ("input", "self"))):
        values.extend(arg if isinstance(arg, (tuple, list)) else [arg])
    if not all(isinstance(value, int) for value in values) or len(values) != 2:
        return False
    positive = [value % 2 for value in values]
    return positive == [1, 0] if name == "permute" else positive[0] != positive[1]


# -- one site ----------------------------------------------------------------------------------
def _site(
    node: fx.Node, op: str, parent: fx.Node, line: _Lineage, search: _Search, nested: bool
) -> WeightSite:
    found = WeightSite(search.names[line.index], line.index, node, op, line.views)
    reason = ""
    if op not in ("linear", "matmul", "mm", "addmm"):
        reason = f"{op} has no sparse kernel"
    elif not line.whole or dims(parent) != 2:
        reason = f"weight is no whole matrix ({', '.join(line.views) or 'not two dimensions'})"
    elif nested:
        reason = "inside the body of a higher-order op"
    elif line.index in search.written:
        reason = "the graph writes to the weight"
    if reason:
        return replace(found, reason=reason)
    return _formed(found, parent, line)


def _formed(site: WeightSite, matrix: fx.Node, line: _Lineage) -> WeightSite:
    """``site`` with its form and operands, or with the reason why it has none."""
    values = _operands(site.node, site.op)
    names = _NAMES[site.op]
    scale = {name: values.pop(name) for name in ("alpha", "beta") if name in values}
    if set(values) - set(names) or any(factor != 1 for factor in scale.values()):
        return replace(site, reason="has arguments that the sparse kernel does not take")
    if call_name(site.node).endswith("_"):
        return replace(site, reason="writes into its operand")
    if sum(value is matrix for value in values.values()) != 1:
        return replace(site, reason="the weight is both operands")
    bias = values.get(names[0] if site.op == "addmm" else "bias")
    left, right = names[-2:] if site.op != "linear" else names[:2]
    on_the_left = values[left] is matrix
    x = values[right if on_the_left else left]
    if not isinstance(x, fx.Node) or dims(x) < (1 if site.op == "linear" else 2):
        return replace(site, reason="the other operand is a vector")
    if on_the_left and (site.op == "linear" or bias is not None):
        return replace(site, reason=f"{site.op} with the weight on the left")
    if bias is not None and not _is_row(bias, matrix, 0 if site.op == "linear" else 1):
        return replace(site, reason="adds something else than a bias vector")
    transposed = line.transposed
    form: Form = "linear"
    if site.op != "linear":
        form = "matmul_left" if on_the_left else "matmul_right"
        transposed = line.transposed != (form == "matmul_right")
    return replace(site, form=form, transposed=transposed, x=x, matrix=matrix, bias=bias)


def _is_row(bias: Any, matrix: fx.Node, dim: int) -> bool:
    """Whether ``bias`` is a vector with one entry for each output feature."""
    if dims(bias) != 1:
        return False
    rows, features = bias.meta["example_value"].shape[0], matrix.meta["example_value"].shape[dim]
    return bool(rows == features)


# -- nodes -------------------------------------------------------------------------------------
def matmul_name(node: fx.Node) -> str | None:
    """Name of the multiplication that ``node`` is, None if it is none."""
    if node.op == "call_function":
        target = node.target
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            library, _, name = str(target).partition(".")
            name = name.partition(".")[0]
            if library == "aten":
                return name if name in _FUNCTIONS else None
            return f"{library}.{name}" if _sounds_like_matmul(name) else None
        return _MATMULS.get(target)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return None


def _sounds_like_matmul(name: str) -> bool:
    """An op of another library, such as transformers' ``grouped_mm_fallback``, by its name."""
    return not _OTHERS_MATMULS.isdisjoint(name.split("_"))


def _bodies(node: fx.Node, gm: fx.GraphModule) -> list[tuple[fx.GraphModule, list[Any]]]:
    """Bodies of a higher-order op with the operands they get, matched from the last one on."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    flat: list[Any] = []
    for arg in node.args:
        flat.extend(arg if isinstance(arg, (tuple, list)) else [arg])
    references = [a for a in flat if isinstance(a, fx.Node) and a.op == "get_attr"]
    operands = [a for a in flat if a not in references]
    found = []
    for reference in references:
        body = getattr(gm, str(reference.target), None)
        if isinstance(body, fx.GraphModule):
            count = len(body.graph.find_nodes(op="placeholder"))
            found.append((body, operands[max(len(operands) - count, 0) :]))
    return found


def _enter(
    body: fx.GraphModule, operands: list[Any], lineage: dict[fx.Node, tuple[_Lineage, ...]]
) -> dict[fx.Node, tuple[_Lineage, ...]]:
    placeholders = body.graph.find_nodes(op="placeholder")
    return {
        inner: lineage[outer]
        for inner, outer in zip(placeholders, operands, strict=False)
        if isinstance(outer, fx.Node) and outer in lineage
    }
