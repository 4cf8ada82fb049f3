"""The kernel of each matmul by a committed weight: which spellings, which stay dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resu_compile.passes.choose_kernels import choose_kernels

CPU = torch.device("cpu")
FORCED = 0.5  # sparse from this sparsity on, at every batch size
OFF = 1.0


class Spelled(nn.Module):
    def __init__(self, spelling, shape):
        super().__init__()
        self.spelling = spelling
        self.bias = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(shape) * (torch.rand(shape) < 0.3))

    def forward(self, x):
        return self.spelling(x, self.weight, self.bias)


SPELLINGS = [
    pytest.param(nn.functional.linear, (4, 8), id="linear"),
    pytest.param(lambda x, w, _: nn.functional.linear(x, w), (4, 8), id="linear without bias"),
    pytest.param(lambda x, w, b: x @ w.t() + b, (4, 8), id="matmul t"),
    pytest.param(lambda x, w, _: x @ w.transpose(0, 1), (4, 8), id="matmul transpose"),
    pytest.param(lambda x, w, _: x @ w.permute(1, 0), (4, 8), id="matmul permute"),
    pytest.param(lambda x, w, _: x @ w, (8, 4), id="matmul in_out"),
    pytest.param(lambda x, w, _: torch.mm(x, w), (8, 4), id="mm in_out"),
    pytest.param(lambda x, w, b: torch.addmm(b, x, w), (8, 4), id="addmm in_out"),
    pytest.param(lambda x, w, b: torch.addmm(b, x, w.T), (4, 8), id="addmm T"),
]

DENSE = [
    pytest.param(lambda x, w, b: torch.addmm(b, x, w, beta=2), (8, 4), id="addmm beta"),
    pytest.param(lambda x, w, _: torch.addmm(x[:, :4], x, w), (8, 4), id="addmm matrix"),
    pytest.param(lambda x, w, _: (x * 2) @ w.relu(), (8, 4), id="changed weight"),
    pytest.param(lambda x, w, _: x[:, :4] * w[0], (8, 4), id="no matmul"),
    pytest.param(lambda x, w, _: torch.bmm(x[None], w[None]), (8, 4), id="bmm"),
]


def graph_of(model, x):
    return torch.export.export(model, (x,), strict=False).module()


def targets(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("spelling", "shape"), SPELLINGS)
def test_every_spelling_of_a_linear(spelling, shape):
    torch.manual_seed(0)
    model, x = Spelled(spelling, shape), torch.randn(3, 8)
    gm = graph_of(model, x)
    report = choose_kernels(gm, {"weight": 0.7}, CPU, FORCED)
    assert "resu_compile.sparse_linear.default" in targets(gm)
    assert list(report.rewritten) == ["weight"]
    torch.testing.assert_close(gm(x), model(x))
    # back to dense: the rows go, the numbers stay
    choose_kernels(gm, {"weight": 0.7}, CPU, OFF)
    assert "resu_compile.sparse_linear.default" not in targets(gm)
    assert list(gm.buffers()) == []
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize(("spelling", "shape"), DENSE)
def test_what_stays_dense(spelling, shape):
    torch.manual_seed(0)
    model, x = Spelled(spelling, shape), torch.randn(3, 8)
    gm = graph_of(model, x)
    code = gm.code
    report = choose_kernels(gm, {"weight": 0.7}, CPU, FORCED)
    assert gm.code == code
    assert report.skipped == {"weight": "dense: not used by a plain matmul"}


def test_threshold():
    model, x = Spelled(nn.functional.linear, (4, 8)), torch.randn(3, 8)
    gm = graph_of(model, x)
    report = choose_kernels(gm, {"weight": 0.4}, CPU, FORCED)
    assert "weight" in report.skipped
    assert report.rewritten == {}
    assert choose_kernels(gm, {}, CPU, FORCED).rewritten == {}
    assert choose_kernels(gm, {"weight": 0.7}, CPU, OFF).skipped == {
        "weight": "dense: threshold is 1.0"
    }


def test_two_uses_share_the_rows():
    model, x = Spelled(lambda x, w, _: (x @ w, x.relu() @ w), (8, 4)), torch.randn(3, 8)
    gm = graph_of(model, x)
    choose_kernels(gm, {"weight": 0.7}, CPU, FORCED)
    assert sorted(dict(gm.named_buffers())) == [
        "weight_csr_t_col",
        "weight_csr_t_ptr",
        "weight_csr_t_val",
    ]
    for got, want in zip(gm(x), model(x), strict=True):
        torch.testing.assert_close(got, want)
    again = dict(gm.named_buffers())
    choose_kernels(gm, {"weight": 0.7}, CPU, FORCED)
    assert dict(gm.named_buffers()).keys() == again.keys()
    torch.testing.assert_close(gm(x)[0], model(x)[0])
