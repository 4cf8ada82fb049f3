"""The kernels of each matmul by a committed weight: spellings, releases, weights packed as one."""

from __future__ import annotations

import copy
import functools
import weakref

import pytest
import torch
from torch import nn

from resu_compile.kernels.plan import BUCKET_ROWS, Kernel, batch_bucket
from resu_compile.passes.choose_kernels import choose_kernels, describe

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
        "weight_packed_0",
        "weight_packed_1",
        "weight_packed_2",
    ]
    for got, want in zip(gm(x), model(x), strict=True):
        torch.testing.assert_close(got, want)
    again = dict(gm.named_buffers())
    choose_kernels(gm, {"weight": 0.7}, CPU, FORCED)
    assert dict(gm.named_buffers()).keys() == again.keys()
    torch.testing.assert_close(gm(x)[0], model(x)[0])


# -- without a dense copy --------------------------------------------------------------------
class Projections(nn.Module):
    """q, k and v of one x, as an attention block has them; k may be stored as [in, out]."""

    def __init__(self, *, bias, turned):
        super().__init__()
        self.q = nn.Linear(8, 8, bias=bias)
        self.k = nn.Linear(8, 4, bias=bias)
        self.v = nn.Linear(8, 4, bias=bias)
        self.out = nn.Linear(16, 8)
        self.turned = nn.Parameter(torch.randn(8, 4)) if turned else None
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.data *= torch.rand_like(parameter) < 0.3

    def forward(self, x):
        k = self.k(x) if self.turned is None else x @ self.turned
        return self.out(torch.cat([self.q(x), k, self.v(x)], -1))


@pytest.mark.parametrize("threshold", [FORCED, OFF])
@pytest.mark.parametrize(("spelling", "shape"), SPELLINGS)
def test_released_weight_and_the_way_back(spelling, shape, threshold, monkeypatch):
    monkeypatch.setattr("resu_compile.runtime.plans.MIN_NUMEL", 1)
    model, x = Spelled(spelling, shape), torch.randn(3, 8)
    model.weight.data[0, :3] = torch.tensor([-0.0, 1.0, -0.0])
    gm = graph_of(model, x)
    choose_kernels(gm, {"weight": 0.95}, CPU, threshold, release_dense=True)
    (product,) = (n for n in gm.graph.nodes if "sparse_linear" in str(n.target))
    assert product.args[1] is None
    at_rows = product.args[6][batch_bucket(len(x))]
    assert at_rows == (Kernel.CSR if threshold == FORCED else Kernel.UNPACK)
    assert [name for name, _ in gm.named_parameters()] in ([], ["bias"])
    torch.testing.assert_close(gm(x), model(x))
    choose_kernels(gm, {"weight": 0.95}, CPU, OFF)
    again = gm.get_parameter("weight")
    assert again.view(torch.int32).equal(model.weight.view(torch.int32))  # -0 too
    assert list(gm.buffers()) == []
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, on any copied program
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_of_one_x_are_packed_as_one(bias, turned, monkeypatch):
    monkeypatch.setattr("resu_compile.runtime.plans.MIN_NUMEL", 1)
    model, x = Projections(bias=bias, turned=turned).eval(), torch.randn(2, 3, 8)
    names = ["q.weight", "turned" if turned else "k.weight", "v.weight"]
    gm = graph_of(model, x)
    sparsities = dict.fromkeys([*names, "out.weight"], 0.9)
    report = choose_kernels(gm, sparsities, CPU, FORCED, release_dense=True)
    # a product without a bias is not taken together with those that have one
    together = names[::2] if bias and turned else [names[1], names[0], names[2]]  # as they run
    assert f"packed with {', '.join(together)}" in report.rewritten["q.weight"]
    assert targets(gm).count("resu_compile.sparse_linear.default") == (3 if bias and turned else 2)
    assert not set(names) & {name for name, _ in gm.named_parameters()}
    want = model(x)
    torch.testing.assert_close(gm(x), want)
    torch.testing.assert_close(copy.deepcopy(gm)(x), want)
    # as before, and as it was
    choose_kernels(gm, sparsities, CPU, FORCED, release_dense=True)
    torch.testing.assert_close(gm(x), want)
    choose_kernels(gm, sparsities, CPU, OFF)
    assert targets(gm).count("resu_compile.sparse_linear.default") == 0
    assert all(gm.get_parameter(name).equal(model.get_parameter(name)) for name in names)
    torch.testing.assert_close(gm(x), want, rtol=0, atol=0)


def test_weight_that_more_than_matmuls_read_keeps_its_dense_copy(monkeypatch):
    monkeypatch.setattr("resu_compile.runtime.plans.MIN_NUMEL", 1)
    model = Spelled(lambda x, w, _: x @ w.t() + w.sum(), (4, 8))
    x = torch.randn(3, 8)
    gm = graph_of(model, x)
    choose_kernels(gm, {"weight": 0.9}, CPU, FORCED, release_dense=True)
    assert gm.get_parameter("weight").equal(model.weight)
    assert "resu_compile.sparse_linear.default" in targets(gm)
    torch.testing.assert_close(gm(x), model(x))


def test_one_held_weight_is_made_at_a_time(monkeypatch):
    monkeypatch.setattr("resu_compile.runtime.plans.MIN_NUMEL", 1)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    gm, alive, values = graph_of(model, torch.randn(3, 8)), [], {}

    def make(name):
        value = values[name].clone()
        alive.append(name)
        weakref.finalize(value, alive.remove, name)
        assert alive == [name]
        return value

    for name in [name for name, _ in model.named_parameters()]:
        values[name] = gm.get_parameter(name).detach() * (torch.rand(8, 8) < 0.2)
        delattr(gm.get_submodule(name.partition(".")[0]), "weight")
    held = {name: functools.partial(make, name) for name in values}
    report = choose_kernels(
        gm, dict.fromkeys(values, 0.8), CPU, FORCED, release_dense=True, held=held
    )
    assert list(report.rewritten) == list(values)
    assert alive == []
    assert held == {}
    assert list(gm.parameters()) == []
    x = torch.randn(3, 8)
    want = x
    for value in values.values():
        want = want @ value.t()
    torch.testing.assert_close(gm(x), want)


def test_words_for_a_plan():
    rows, tiles, unpack = int(Kernel.ROWS), int(Kernel.TILES), int(Kernel.UNPACK)
    assert len(BUCKET_ROWS) == 10
    assert describe([rows] * 3 + [tiles] * 4 + [unpack] * 3) == (
        "ROWS up to 4, TILES up to 64 rows, then UNPACK"
    )
    assert describe([tiles] * 10) == "TILES"
