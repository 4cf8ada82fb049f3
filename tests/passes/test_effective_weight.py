from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified

import resu_compile as resu
from resu_compile.kernels.mask_bits import pack_mask
from resu_compile.passes.effective_weight import route_gradients, use_weights_themselves
from resu_compile.phase import Routing
from tests.compiling import Backend
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


# -- where it comes ------------------------------------------------------------------------------
def order(gm):
    return [name.removesuffix(".default") for name in calls(gm)]


def test_the_effective_weight_comes_just_before_its_first_use():
    gm = captured(model, X)
    routings = {position_of(gm, p): Routing.ACTIVE for p in (W, V)}
    result, _, _ = route_gradients(gm, routings)
    assert order(result) == ["effective_weight", "linear", "relu", "effective_weight", "matmul"]


def test_it_comes_before_a_region_without_gradients():
    def call(x):
        with torch.no_grad():
            scale = W.abs().max()
        return F.linear(x, W) / scale

    gm = captured(call, X)
    result, _, _ = route_gradients(gm, {position_of(gm, W): Routing.ACTIVE})
    assert order(result)[:2] == ["effective_weight", "_set_grad_enabled"]
    args = [gm.parameters_at.get(i, X) for i in range(2)]
    result(*args, pack_mask(MASK))[0].sum().backward()
    assert (W.grad[MASK] != 0).any()
    assert (W.grad[~MASK] == 0).all()
    W.grad = None


def test_it_comes_before_a_function_transform():
    def call(x):
        return torch.func.vmap(lambda row: F.linear(row.relu(), W))(x)

    gm = captured(call, X)
    result, _, _ = route_gradients(gm, {position_of(gm, W): Routing.ACTIVE})
    names = order(result)
    nesting = next(i for i, name in enumerate(names) if "increment_nesting" in name)
    assert names.index("effective_weight") < nesting
    args = [gm.parameters_at.get(i, X) for i in range(2)]
    result(*args, pack_mask(MASK))[0].sum().backward()
    assert (W.grad[~MASK] == 0).all()
    W.grad = None


def test_gradients_are_routed_as_they_come():
    """Not all at the end of the backward pass, which would keep two copies of them until then."""
    layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    backward = []

    def inner(gm, inputs):
        def keep(bw, _):
            backward.append(bw)
            return make_boxed_func(bw.forward)

        return aot_module_simplified(
            gm, inputs, fw_compiler=lambda fw, _: make_boxed_func(fw.forward), bw_compiler=keep
        )

    resu.sparsify(layers, 0.5, compile=False)
    torch.compile(layers, backend=Backend(inner=inner))(X).sum().backward()
    (graph,) = backward
    names = [name for name in order(graph) if name in ("mm", "route_gradient")]
    assert names[:3].count("route_gradient") == 1  # the last layer's, before the others' products
    assert names.index("route_gradient") < len(names) / 2
