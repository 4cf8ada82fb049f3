from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resu_compile.passes.fx_utils import (
    append_placeholder,
    changed_in_place,
    copy_graph_module,
    dims,
    returned,
)
from tests.graphs import calls, captured

W = nn.Parameter(torch.randn(6, 6))
X = torch.randn(4, 6)


def positions(gm, found):
    return sorted("w" if i in gm.parameters_at else "x" for i in found)


def in_no_grad(write):
    def call(x):
        with torch.no_grad():
            write()
        return x @ W

    return call


WRITES = {
    "method": lambda: W.mul_(1),
    "operator": lambda: W.__imul__(1),
    "item": lambda: W.__setitem__(0, W[0]),
    "row": lambda: W[0].add_(0),
    "transposed": lambda: W.t().add_(0),
    "data": lambda: W.data.clamp_(-9, 9),
    "copy": lambda: W.copy_(W * 1),
    "list": lambda: torch._foreach_mul_([W], 1),
    "out": lambda: torch.mul(W, 1, out=W),
    "aten": lambda: torch.ops.aten.mul_.Tensor(W, torch.ones(())),
    "function": lambda: torch.relu_(W),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_found(name):
    gm = captured(in_no_grad(WRITES[name]), X)
    assert positions(gm, changed_in_place(gm.graph)) == ["w"]


READS = {
    "plain": lambda x: x @ W,
    "of a copy": lambda x: x @ W.clone().mul_(2),
    "of the other operand": lambda x: x.add_(1) @ W,
    "dunder": lambda x: x @ W.__neg__(),
    "invert": lambda x: x @ (~(W > 0)).float(),
    "is finite": lambda x: x @ W + W.isfinite().all(),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_no_writes(name):
    gm = captured(READS[name], X.clone())
    assert "w" not in positions(gm, changed_in_place(gm.graph))
    assert not returned(gm.graph)


RETURNS = {
    "itself": (lambda x: (x @ W, W), []),  # Dynamo returns inputs without the graph
    "view": (lambda x: (x @ W, W.t()), ["w"]),
    "view of a view": (lambda x: {"a": x @ W, "b": [W.t()[0]]}, ["w"]),
    "copy": (lambda x: (x @ W, W.clone()), []),
    "product": (lambda x: x @ W, []),
}


@pytest.mark.parametrize("name", RETURNS)
def test_returned_inputs_are_found(name):
    call, expected = RETURNS[name]
    gm = captured(call, X)
    assert [kind for kind in positions(gm, returned(gm.graph)) if kind == "w"] == expected


def test_a_copy_is_independent_and_keeps_what_dynamo_noted():
    gm = captured(lambda x: F.relu(x @ W), X)
    before = calls(gm)
    copy = copy_graph_module(gm)
    copy.graph.erase_node(copy.graph.find_nodes(op="output")[0])
    assert calls(gm) == before
    for old, new in zip(
        gm.graph.find_nodes(op="placeholder"),
        copy_graph_module(gm).graph.find_nodes(op="placeholder"),
        strict=True,
    ):
        assert new._dynamo_source is old._dynamo_source
        assert new.meta["example_value"] is old.meta["example_value"]


def test_an_appended_placeholder_comes_last_and_is_static():
    gm = copy_graph_module(captured(lambda x: x @ W, X))
    node = append_placeholder(gm.graph, "bits")
    gm.graph.lint()
    assert gm.graph.find_nodes(op="placeholder")[-1] is node
    assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "guarded"
    assert dims(node) == -1
    assert dims(3) == -1
