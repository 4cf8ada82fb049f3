from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resu_compile.kernels.mask_bits import pack_mask
from resu_compile.passes.effective_weight import route_gradients, use_weights_themselves
from resu_compile.phase import Routing
from tests.graphs import calls, captured, text

W = nn.Parameter(torch.randn(6, 8))
V = nn.Parameter(torch.randn(6, 6))
X = torch.randn(4, 8)
MASK = torch.rand(6, 8) > 0.5


def model(x):
    return F.relu(F.linear(x, W)) @ V


def position_of(gm, parameter):
    (index,) = [i for i, p in gm.parameters_at.items() if p is parameter]
    return index


def test_graph_before_and_after():
    gm = captured(model, X)
    assert calls(gm) == ["linear", "relu", "matmul"]
    w, v = position_of(gm, W), position_of(gm, V)
    result, taken, report = route_gradients(gm, {w: Routing.ACTIVE, v: Routing.PRUNED})
    assert taken == [w, v]
    assert calls(gm) == ["linear", "relu", "matmul"]  # the original is not changed
    lines = text(result).splitlines()
    assert lines[1].endswith("g_w__bits, g_v__bits):")
    assert any("effective_weight.default(g_w_, g_w__bits, True)" in line for line in lines)
    assert any("effective_weight.default(g_v_, g_v__bits, False)" in line for line in lines)
    assert list(report.rewritten.values()) == [
        "effective_weight(active)",
        "effective_weight(pruned)",
    ]


@pytest.mark.parametrize("routing", [Routing.ACTIVE, Routing.PRUNED])
def test_values_are_kept_and_gradients_routed(routing):
    gm = captured(model, X)
    w = position_of(gm, W)
    result, _, _ = route_gradients(gm, {w: routing})
    args = [gm.parameters_at.get(i, X) for i in range(3)]
    (expected,) = gm(*args)
    (out,) = result(*args, pack_mask(MASK))
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), W)
    (dense,) = torch.autograd.grad(expected.square().sum(), W)
    keep = MASK if routing is Routing.ACTIVE else ~MASK
    assert torch.equal(grad, dense.where(keep, torch.zeros(())))


def test_every_use_of_a_weight_is_routed_once():
    gm = captured(lambda x: F.linear(x, W) @ W + W.sum(), X)
    result, _, _ = route_gradients(gm, {position_of(gm, W): Routing.ACTIVE})
    assert calls(result).count("effective_weight.default") == 1
    placeholder = result.graph.find_nodes(op="placeholder")[position_of(gm, W)]
    assert len(placeholder.users) == 1


def skipped(call, routing=Routing.ACTIVE):
    gm = captured(call, X)
    result, taken, report = route_gradients(gm, {position_of(gm, W): routing})
    assert calls(result) == calls(gm)
    assert taken == []
    (reason,) = report.skipped.values()
    return reason


def test_near_misses_stay_as_they_are():
    def writes(x):
        with torch.no_grad():
            W.t().mul_(1)
        return F.linear(x, W)

    assert skipped(model, Routing.ALL) == "gradient reaches every place"
    assert skipped(lambda x: (F.linear(x, W), W.t())).startswith("the graph returns it")
    assert skipped(writes).startswith("the graph writes to it")


def test_an_unused_weight_is_reported():
    gm = captured(model, X)
    (gm.graph.find_nodes(op="output")[0]).args = ((),)
    gm.graph.eliminate_dead_code()
    _, taken, report = route_gradients(gm, {position_of(gm, W): Routing.ACTIVE})
    assert taken == []
    assert list(report.skipped.values()) == ["not used in this graph"]


# -- the joint graph -----------------------------------------------------------------------------
def test_the_weight_itself_is_used_in_the_joint_graph():
    graph = torch.fx.Graph()
    w, bits, x = (graph.placeholder(name) for name in ("w", "bits", "x"))
    op = torch.ops.resu_compile
    effective = graph.call_function(op.effective_weight.default, (w, bits, True))
    product = graph.call_function(torch.ops.aten.mm.default, (x, effective))
    grad = graph.call_function(op.route_gradient.default, (effective, bits, True))
    graph.output((product, grad))
    use_weights_themselves(graph)
    graph.lint()
    assert product.args == (x, w)
    assert grad.args == (w, bits, True)
    assert not graph.find_nodes(op="call_function", target=op.effective_weight.default)
