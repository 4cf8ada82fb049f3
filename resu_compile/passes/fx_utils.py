"""Pure helpers on graphs as Dynamo captures them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

# Calls whose result shares memory with their first operand, or may.
ALIASES = frozenset(
    {
        *("t", "T", "mT", "H", "transpose", "swapaxes", "swapdims", "permute", "adjoint"),
        *("movedim", "moveaxis", "reshape", "view", "view_as", "reshape_as", "flatten"),
        *("unflatten", "ravel", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to"),
        *("narrow", "select", "getitem", "chunk", "split", "tensor_split", "unbind", "unfold"),
        *("contiguous", "detach", "alias", "get_data_attr", "data", "requires_grad_", "to"),
        *("type", "type_as", "float", "half", "bfloat16", "double", "cuda", "cpu"),
    }
)
_WRITING_DUNDERS = frozenset(
    {"__setitem__"}
    | {
        f"__i{name}__"
        for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
        + ("and", "or", "xor", "lshift", "rshift")
    }
)
# Calls whose result holds nothing but elements of their first operand.
VIEWS = ALIASES | {"clone", "repeat", "index_select"}


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own; attributes and submodules are shared.

    What Dynamo notes beside the graph (the source of each input, which AOTAutograd needs to
    recognise static inputs for CUDA graphs) is carried over.
    """
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    result.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    old = gm.graph.find_nodes(op="placeholder")
    new = result.graph.find_nodes(op="placeholder")
    for before, after in zip(old, new, strict=True):
        after._dynamo_source = getattr(before, "_dynamo_source", None)
    return result


def append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A further input after all others, at an address that stays the same between calls."""
    from torch._dynamo.source import ConstantSource

    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node._dynamo_source = ConstantSource(source_name=node.name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
    return node


def call_name(node: fx.Node) -> str:
    """The plain name of what ``node`` calls: ``"t"`` for method, function and ATen op alike."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[-1]
    else:
        name = getattr(node.target, "__name__", str(node.target)).lstrip("_")
    if name == "getattr":
        name = str(node.args[1])
    return "T" if name == "numpy_T" else name  # as newer releases capture ``w.T``


def first_operand(node: fx.Node) -> Any:
    """The operand that a view is a view of."""
    if node.args:
        return node.args[0]
    return node.kwargs.get("input", node.kwargs.get("self"))


def dims(value: Any) -> int:
    """Dimensions of the tensor that a node yields; -1 if it is none."""
    value = value.meta.get("example_value") if isinstance(value, fx.Node) else value
    return value.dim() if isinstance(value, Tensor) else -1


def changed_in_place(graph: fx.Graph) -> set[int]:
    """Positions of the placeholders that the graph writes to, itself or through an alias."""
    return _written_and_returned(graph)[0]


def returned(graph: fx.Graph) -> set[int]:
    """Positions of the placeholders that the graph returns, themselves or as an alias."""
    return _written_and_returned(graph)[1]


def _written_and_returned(graph: fx.Graph) -> tuple[set[int], set[int]]:
    origin = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    written: set[int] = set()
    for node in graph.nodes:
        if node.op == "output":
            return written, {origin[n] for n in node.all_input_nodes if n in origin}
        if node.op not in ("call_function", "call_method"):
            continue
        first = first_operand(node)
        sources = first if isinstance(first, (tuple, list)) else [first]  # _foreach_mul_([w], 2)
        found = [origin[s] for s in sources if isinstance(s, fx.Node) and s in origin]
        if found and writes(node):
            written.update(found)
        if found and (call_name(node) in ALIASES or writes(node)):
            origin[node] = found[0]
        out = node.kwargs.get("out")
        if isinstance(out, fx.Node) and out in origin:
            written.add(origin[out])
    return written, set()


def writes(node: fx.Node) -> bool:
    """Whether a call writes into one of its operands."""
    if isinstance(node.target, torch._ops.OpOverload):
        first = node.target._schema.arguments[0]
        return first.alias_info is not None and first.alias_info.is_write
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        name = f"__{name}__"
    return name in _WRITING_DUNDERS or (name.endswith("_") and not name.endswith("__"))
