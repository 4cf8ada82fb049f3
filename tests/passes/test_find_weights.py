from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from resu_compile.passes.find_weights import find_weights
from tests.graphs import captured

W = nn.Parameter(torch.randn(6, 8))
S = nn.Parameter(torch.randn(8, 8))
E = nn.Parameter(torch.randn(3, 6, 8))
B = nn.Parameter(torch.randn(6))
X = torch.randn(4, 8)
X6 = torch.randn(4, 6)


def sites_of(call, *inputs, parameters=(W, S, E)):
    gm = captured(call, *inputs)
    candidates = [i for i, p in gm.parameters_at.items() if any(p is q for q in parameters)]
    sites, report = find_weights(gm, candidates or list(gm.parameters_at))
    return sites, report


# call, input, op, views, form, whether W of y = x W^T is the parameter's transpose
SPELLINGS = {
    "linear": (lambda x: F.linear(x, W, B), X, "linear", (), "linear", False),
    "linear by name": (lambda x: F.linear(weight=W, input=x), X, "linear", (), "linear", False),
    "linear of t": (lambda x: F.linear(x, W.t()), X6, "linear", ("t",), "linear", True),
    "vector": (lambda x: F.linear(x, W), X[0], "linear", (), "linear", False),
    "x @ w": (lambda x: x @ W, X6, "matmul", (), "matmul_right", True),
    "x @ w.T": (lambda x: x @ W.T, X, "matmul", ("T",), "matmul_right", False),
    "x @ w.mT": (lambda x: x @ W.mT, X, "matmul", ("mT",), "matmul_right", False),
    "transpose": (
        lambda x: x @ torch.transpose(W, dim0=0, dim1=1),
        X,
        "matmul",
        ("transpose",),
        "matmul_right",
        False,
    ),
    "negative": (lambda x: x @ W.transpose(-1, -2), X, "matmul", ("transpose",), "matmul_right", 0),
    "permute": (lambda x: x @ W.permute(1, 0), X, "matmul", ("permute",), "matmul_right", False),
    "identity": (lambda x: x @ W.permute(0, 1), X6, "matmul", ("permute",), None, False),
    "swapaxes": (lambda x: x @ W.swapaxes(0, 1), X, "matmul", ("swapaxes",), "matmul_right", False),
    "twice": (lambda x: x @ W.t().t(), X6, "matmul", ("t", "t"), "matmul_right", True),
    "contiguous": (
        lambda x: torch.mm(x, W.t().contiguous()),
        X,
        "mm",
        ("t", "contiguous"),
        "matmul_right",
        False,
    ),
    "data": (lambda x: x @ W.data, X6, "matmul", ("get_data_attr",), "matmul_right", True),
    "method": (lambda x: x.matmul(W.T), X, "matmul", ("T",), "matmul_right", False),
    "three dimensions": (lambda x: x @ W, X6[None], "matmul", (), "matmul_right", True),
    "linalg": (lambda x: torch.linalg.matmul(x, W), X6, "matmul", (), "matmul_right", True),
    "w @ x": (lambda x: W @ x, X.t(), "matmul", (), "matmul_left", False),
    "w.T @ x": (lambda x: W.T @ x, X6.t(), "matmul", ("T",), "matmul_left", True),
    "batched left": (lambda x: W @ x, X.t()[None], "matmul", (), "matmul_left", False),
    "addmm": (lambda x: torch.addmm(B, x, W.t()), X, "addmm", ("t",), "matmul_right", False),
    "addmm method": (lambda x: B.addmm(x, W.t()), X, "addmm", ("t",), "matmul_right", False),
    "addmm scaled": (lambda x: torch.addmm(B, x, W.t(), alpha=2), X, "addmm", ("t",), None, False),
    "addmm of one": (lambda x: torch.addmm(B[:1], x, W.t()), X, "addmm", ("t",), None, False),
    "addmm left": (lambda x: torch.addmm(x, W, S), torch.zeros(6, 8), "addmm", (), None, False),
    "addmm in place": (lambda x: X6.clone().addmm_(x, W.t()), X, "addmm", ("t",), None, False),
    "matrix vector": (lambda x: W @ x, X[0], "matmul", (), None, False),
    "vector matrix": (lambda x: x @ W.t(), X[0], "matmul", ("t",), None, False),
    "mv": (lambda x: W.mv(x), X[0], "mv", (), None, False),
    "inner": (lambda x: torch.inner(x, W), X, "inner", (), None, False),
    "both": (lambda x: S @ S + x, X[:1], "matmul", (), None, False),
    "einsum": (lambda x: torch.einsum("bi,oi->bo", x, W), X, "einsum", (), None, False),
    "tensordot": (lambda x: torch.tensordot(x, W, ([1], [1])), X, "tensordot", (), None, False),
    "bmm": (lambda x: torch.bmm(x, E.mT), X.expand(3, 4, 8), "bmm", ("mT",), None, False),
    "baddbmm": (
        lambda x: torch.baddbmm(x, E, E.mT),
        torch.zeros(3, 6, 6),
        "baddbmm",
        (),
        None,
        False,
    ),
    "experts": (lambda x: x @ E.mT, X, "matmul", ("mT",), None, False),
    "expert": (lambda x: x @ E[1].t(), X, "matmul", ("getitem", "t"), None, False),
    "unbind": (
        lambda x: x @ E.unbind(0)[2].t(),
        X,
        "matmul",
        ("unbind", "getitem", "t"),
        None,
        False,
    ),
    "slice": (lambda x: F.linear(x, W[:3]), X, "linear", ("getitem",), None, False),
    "chunk": (
        lambda x: F.linear(x, W.chunk(2)[0]),
        X,
        "linear",
        ("chunk", "getitem"),
        None,
        False,
    ),
    "split": (
        lambda x: F.linear(x, torch.split(W, 2)[0]),
        X,
        "linear",
        ("split", "getitem"),
        None,
        False,
    ),
    "narrow": (lambda x: F.linear(x, W.narrow(0, 0, 2)), X, "linear", ("narrow",), None, False),
    "reshape": (
        lambda x: F.linear(x, W.reshape(3, 16)),
        X.view(2, 16),
        "linear",
        ("reshape",),
        0,
        0,
    ),
    "view": (lambda x: x @ W.view(2, 3, 8).mT, X, "matmul", ("view", "mT"), None, False),
    "flatten": (lambda x: F.linear(x, E.flatten(1)), X.repeat(1, 6), "linear", ("flatten",), 0, 0),
    "expand": (lambda x: x @ W.t().expand(2, 8, 6), X, "matmul", ("t", "expand"), None, False),
    "unsqueeze": (lambda x: x @ W.t()[None], X, "matmul", ("t", "getitem"), None, False),
    "cast": (lambda x: x.double() @ W.double().t(), X, "matmul", ("double", "t"), None, False),
    "to": (lambda x: F.linear(x.half(), W.to(torch.half)), X, "linear", ("to",), None, False),
    "reversed": (lambda x: F.linear(W, x), X, "linear", (), None, False),
    "aten": (lambda x: torch.ops.aten.mm.default(x, W), X6, "mm", (), "matmul_right", True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    call, x, op, views, form, transposed = SPELLINGS[name]
    sites, report = sites_of(call, x)
    site = sites[0]
    assert (site.op, site.views, site.form) == (op, views, form or None)
    assert site.weight in report.rewritten
    assert not report.skipped
    if form:
        assert site.transposed == bool(transposed)
        assert site.reason == ""
        assert site.x is not None
    else:
        assert site.reason
        assert site.x is None


def test_operands_are_those_of_the_call():
    (site,), _ = sites_of(lambda x: torch.addmm(B, mat2=W.t(), mat1=x), X)
    assert site.x.name == "l_x_"
    assert site.bias.meta["example_value"].shape == (6,)
    assert site.matrix.meta["example_value"].shape == (8, 6)


# -- more than one weight ------------------------------------------------------------------------
def test_a_stack_of_weights_is_a_use_of_each():
    experts = [nn.Parameter(torch.randn(6, 8)) for _ in range(3)]
    x = torch.randn(3, 4, 8)
    sites, _ = sites_of(lambda x: torch.bmm(x, torch.stack(experts).mT), x, parameters=experts)
    assert len({site.index for site in sites}) == 3
    assert {site.views for site in sites} == {("stack", "mT")}


def test_product_of_two_weights_is_a_use_of_both():
    low, high = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 6))
    sites, _ = sites_of(lambda x: x @ (low @ high), X, parameters=(low, high))
    assert {site.form for site in sites} == {"matmul_left", "matmul_right"}
    assert len({site.index for site in sites}) == 2


def test_one_weight_used_twice_has_two_sites():
    sites, report = sites_of(lambda x: F.linear(x, W) @ W, X)
    assert [site.op for site in sites] == ["linear", "matmul"]
    assert list(report.rewritten.values()) == ["linear, matmul"]


# -- modules -------------------------------------------------------------------------------------
def names_found(model, *inputs):
    names = {id(p): name for name, p in model.named_parameters()}
    gm = captured(model, *inputs)
    sites, report = find_weights(gm, list(gm.parameters_at))
    found = {names[id(gm.parameters_at[site.index])]: site.op for site in sites}
    return found, report


@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention(training):
    model = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True).train(training)
    with torch.set_grad_enabled(training):
        found, _ = names_found(model, *[torch.randn(2, 4, 8)] * 3)
    assert set(found) == {"in_proj_weight", "out_proj.weight"}  # bias_k, bias_v are only added


def test_multi_head_attention_with_separate_projections():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    found, _ = names_found(model, torch.randn(3, 2, 8), torch.randn(3, 2, 6), torch.randn(3, 2, 4))
    assert set(found) == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(training):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(training)
    with torch.set_grad_enabled(training):
        found, _ = names_found(model, torch.randn(2, 4, 8))
    weights = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert set(found) == weights  # no biases, no norms


def test_hugging_face_conv1d():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
    gm = captured(conv, torch.randn(2, 4, 8))
    (site,) = find_weights(gm, [i for i, p in gm.parameters_at.items() if p.dim() == 2])[0]
    assert (site.op, site.form, site.transposed) == ("addmm", "matmul_right", True)


@pytest.mark.parametrize(
    ("layer", "shape", "op"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 9), "conv1d"),
        (nn.Conv2d(3, 4, 1), (2, 3, 5, 5), "conv2d"),
        (nn.Conv2d(4, 4, 3, groups=2, padding=1), (2, 4, 5, 5), "conv2d"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5), "conv2d"),
        (nn.Conv3d(3, 4, 2), (1, 3, 4, 4, 4), "conv3d"),
        (nn.ConvTranspose1d(3, 4, 2), (2, 3, 5), "conv_transpose1d"),
        (nn.ConvTranspose2d(3, 4, 2), (2, 3, 5, 5), "conv_transpose2d"),
        (nn.Bilinear(3, 4, 5), (2, 3), "bilinear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_layers_without_a_sparse_kernel(layer, shape, op):
    inputs = [torch.randn(shape)] + [torch.randn(2, 4)] * (op == "bilinear")
    found, report = names_found(layer, *inputs)
    assert found == {"weight": op}
    assert all("sparse" not in reason for reason in report.skipped.values())


def test_lstm_where_dynamo_allows_it():
    with torch._dynamo.config.patch(allow_rnn=True):
        found, _ = names_found(nn.LSTM(8, 8), torch.randn(3, 2, 8))
    assert {"weight_ih_l0", "weight_hh_l0"} <= set(found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpointing(use_reentrant):
    def call(x):
        return checkpoint(lambda y: F.relu(F.linear(y, W)) @ S[:6], x, use_reentrant=use_reentrant)

    sites, _ = sites_of(call, X)
    assert [(site.op, site.views) for site in sites] == [("linear", ()), ("matmul", ("getitem",))]
    assert [site.form for site in sites] == [None, None]
    assert sites[0].reason == "inside the body of a higher-order op"


def test_inside_an_autograd_function():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, grad):
            return grad @ ctx.saved_tensors[0], None

    x = X.clone().requires_grad_()
    sites, _ = sites_of(lambda x: Product.apply(x, W), x)
    assert {site.op for site in sites} == {"matmul"}  # in the forward and in the backward body


# -- near misses: no site ------------------------------------------------------------------------
P = nn.Parameter(torch.randn(4, 8))  # as large as the activations
M3 = nn.Parameter(torch.randn(3, 1, 6))
NEAR_MISSES = {
    "additive table": (lambda x: F.linear(x + P, W), X, P, "add"),
    "gain": (lambda x: F.linear(x * P, W), X, P, "mul"),
    "matrix to add": (lambda x: torch.addmm(P, x, S), X, P, "addmm"),
    "batch to add": (lambda x: torch.baddbmm(M3, x, E.mT), torch.randn(3, 4, 8), M3, "baddbmm"),
    "learned queries": (lambda x: F.linear(P, W) + F.linear(x, W), X, P, "linear"),
    "class token": (lambda x: torch.cat([P, x]) @ S, X, P, "cat"),
    "look-up": (lambda x: F.embedding(x.long() % 4, P), X, P, "embedding"),
    "type donor": (lambda x: x.type_as(P) @ S, X, P, "type_as"),
    "shape donor": (lambda x: x.view_as(P) @ S, X, P, "view_as"),
    "scaled weight": (lambda x: x @ (S * 2) + P, X, S, "mul"),
    "norm": (lambda x: x / P.norm(), X, P, "norm"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    call, x, parameter, used_by = NEAR_MISSES[name]
    sites, report = sites_of(call, x, parameters=(parameter, W, E))
    assert parameter.shape not in [site_shape(site) for site in sites]
    (reason,) = report.skipped.values()
    assert reason == f"used by {used_by}, not as the weight of a matmul"


def site_shape(site):
    """Shape of the placeholder that is a site's weight."""
    (placeholder,) = [
        node for node in site.node.graph.find_nodes(op="placeholder") if node.name == site.weight
    ]
    return placeholder.meta["example_value"].shape


def test_a_weight_that_the_graph_writes_to_takes_no_sparse_kernel():
    def call(x):
        with torch.no_grad():
            S.mul_(1)
        return x @ S

    (site,), _ = sites_of(call, X)
    assert (site.form, site.reason) == (None, "the graph writes to the weight")


def test_learned_constant_under_a_convolution():
    start, conv = nn.Parameter(torch.randn(1, 3, 4, 4)), nn.Conv2d(3, 2, 3)
    gm = captured(lambda x: conv(start) + x, torch.randn(1))
    sites, report = find_weights(gm, list(gm.parameters_at))
    assert [gm.parameters_at[site.index] is conv.weight for site in sites] == [True]
    assert "used by conv2d" in " ".join(report.skipped.values())


def test_unused_candidate_is_reported():
    gm = captured(lambda x, y: x @ y, X, S.detach())
    assert [site.index for site in find_weights(gm, [1])[0]] == [1]
    assert not find_weights(gm, [])[0]
    gm.graph.erase_node(gm.graph.find_nodes(op="output")[0])
    gm.graph.erase_node(next(n for n in gm.graph.nodes if n.op == "call_function"))
    gm.graph.output(gm.graph.find_nodes(op="placeholder")[0])
    assert find_weights(gm, [1])[1].skipped == {"l_y_": "not used in this graph"}


def test_all_matrices_are_candidates_by_default():
    gm = captured(lambda x: F.linear(x, W, B), X)
    sites, report = find_weights(gm)
    assert [site.op for site in sites] == ["linear"]
    assert list(report.skipped.values()) == ["used by linear, not as the weight of a matmul"]


def test_report_prints_what_was_found_and_left():
    gm = captured(lambda x: F.linear(x + P, W), X)
    text = str(find_weights(gm, list(gm.parameters_at))[1])
    assert "1 rewritten, 1 skipped" in text
    assert "-> linear" in text
    assert "left: used by add" in text


@pytest.mark.parametrize("name", ["grouped_mm_fallback", "linear"])
def test_an_op_of_another_library_that_is_named_like_a_product(name):
    @torch.library.custom_op(f"find_weights_test::{name}", mutates_args=())
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    @product.register_fake
    def _(x, weight):
        return x.new_empty(x.shape[0], weight.shape[1])

    op = f"find_weights_test.{name}"
    for call in (getattr(torch.ops.find_weights_test, name), product):
        (site,), _ = sites_of(lambda x, call=call: call(x, W.transpose(0, 1)), X)
        assert (site.op, site.views, site.form) == (op, ("transpose",), None)
        assert site.reason == f"{op} has no sparse kernel"
