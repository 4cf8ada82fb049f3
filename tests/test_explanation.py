from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel, batch_bucket
from resu_compile.runtime import sparse_products
from resu_compile.runtime.plans import Plan
from tests.test_reporting import Net

X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def times(monkeypatch):
    """Times that say which kernel is faster; nothing is measured."""

    def set_times(dense_ms, sparse_ms):
        faster = Kernel.CSR if sparse_ms < dense_ms else Kernel.DENSE
        measured = {Kernel.DENSE: dense_ms, Kernel.CSR: sparse_ms}
        plan = Plan(
            (faster,) * len(BUCKET_ROWS),
            dict.fromkeys(range(len(BUCKET_ROWS)), measured),
            "shipped",
        )
        monkeypatch.setattr(sparse_products, "choose_plan", lambda *_, **__: plan)

    set_times(2.0, 1.0)
    return set_times


class Broken(Net):
    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return x @ self.second


@pytest.mark.usefixtures("times")
def test_explain_shows_sites_kernels_times_and_bytes():
    model = resu.sparsify(Net(), 0.75, compile=False)
    explanation = resu.explain(model, X)
    first, second = explanation.sites
    assert (first.parameter, first.op, first.views, first.shape) == (
        "first.weight",
        "linear",
        (),
        (8, 8),
    )
    assert (first.rows, first.sparsity) == (4, 0.75)
    assert (first.kernel_dense, first.kernel_sparse, first.kernel_resu) == ("dense", "csr", "dense")
    assert (first.dense_ms, first.sparse_ms, first.reason) == (2.0, 1.0, "")
    assert (first.bytes_dense, first.bytes_packed) == (256, 16 * 4 + 8)
    assert (second.parameter, second.op, second.shape) == ("second", "matmul", (8, 3))
    assert explanation.graphs == 1
    assert explanation.device == "cpu"
    assert explanation.skipped["embedding.weight"] == "embedding, or tied to one"
    assert "no captured graph of this call multiplies by it" in explanation.skipped["unused.weight"]
    assert "first.bias" in explanation.skipped


def test_explain_says_where_dense_wins(times):
    model = resu.sparsify(Net(), 0.75, compile=False)
    times(1.0, 2.0)
    site = resu.explain(model, X).sites[0]
    assert (site.kernel_sparse, site.dense_ms, site.sparse_ms) == ("dense", 1.0, 2.0)
    assert site.times_from == "shipped"
    assert site.reason == "no sparse kernel measured faster"


def test_explain_says_why_nothing_was_measured():
    site = resu.explain(resu.sparsify(Net(), 0.75, compile=False), X).sites[0]
    assert (site.dense_ms, site.sparse_ms) == (None, None)
    assert site.reason == site.times_from == "not measured: fewer than 64 * 64 elements"


def test_explain_shows_every_batch_size_where_it_may_change(monkeypatch):
    kernels = [Kernel.ROWS] * 2 + [Kernel.TILES] * 5 + [Kernel.DENSE] * 3
    measured = {
        batch_bucket(1): {Kernel.DENSE: 4.0, Kernel.TILES: 3.0, Kernel.ROWS: 1.0},
        batch_bucket(128): {Kernel.DENSE: 5.0, Kernel.TILES: 6.0},
    }
    plan = Plan(tuple(kernels), measured, "cache, measured")
    monkeypatch.setattr(sparse_products, "choose_plan", lambda *_, **__: plan)
    x = torch.randn(4, 8)
    torch._dynamo.mark_dynamic(x, 0)
    explanation = resu.explain(resu.sparsify(Net(), 0.75, compile=False), x)
    site = explanation.sites[0]
    assert site.rows is None
    assert site.kernel_sparse == "rows to 2, tiles to 64, dense"
    assert [choice.rows for choice in site.choices] == list(BUCKET_ROWS)
    assert (site.choices[0].dense_ms, site.choices[0].sparse_ms) == (4.0, 1.0)
    last = site.choices[batch_bucket(128)]
    assert (last.kernel, last.dense_ms, last.sparse_ms) == ("dense", 5.0, 6.0)
    assert (site.dense_ms, site.choices[4].sparse_ms, site.reason) == (None, None, "")
    text = str(explanation)
    assert "dense / rows to 2, tiles to 64, dense / dense" in text
    assert "cache, measured" in text
    assert "4.0000" in text
    assert "6.0000" in text


@pytest.mark.parametrize(
    ("threshold", "reason"),
    [
        (1.0, "sparse_threshold=1.0 turns the sparse kernels off"),
        (0.9, "sparsity 75.00% is under sparse_threshold=0.9"),
    ],
)
def test_explain_says_why_a_threshold_keeps_dense(threshold, reason):
    model = resu.sparsify(Net(), 0.75, compile=False, sparse_threshold=threshold)
    assert resu.explain(model, X).sites[0].reason == reason


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.q(x), self.k(x)


def test_explain_shows_what_is_multiplied_as_one(times):
    model = resu.sparsify(Attention().eval(), 0.75, compile=False)
    sites = resu.explain(model, X).sites
    assert [site.merged_with for site in sites] == [("k.weight",), ("q.weight",)]
    assert "as one with k.weight" in str(resu.explain(model, X))
    times(1.0, 2.0)
    assert [site.merged_with for site in resu.explain(model, X).sites] == [(), ()]


@pytest.mark.usefixtures("times")
def test_explain_of_a_broken_model():
    model = resu.sparsify(Broken(), 0.5, compile=False)
    explanation = resu.explain(model, x=X)
    assert explanation.graphs == 2
    assert [site.parameter for site in explanation.sites] == ["first.weight", "second"]


def test_explain_of_a_plain_model():
    explanation = resu.explain(Net(), X)
    assert [site.reason for site in explanation.sites] == ["no mask", "no mask"]
    assert [site.bytes_packed for site in explanation.sites] == [256, 96]
    assert explanation.skipped["first.bias"] == "no matmul multiplies by it"


@pytest.mark.usefixtures("times")
def test_explain_of_a_compiled_model_leaves_it_compiled():
    model = resu.sparsify(Net(), 0.5, sparse_threshold=1.0)
    compiled = model._compiled_call_impl
    assert resu.explain(torch.compile(model, backend="eager"), X).sites
    assert model._compiled_call_impl is compiled


@pytest.mark.usefixtures("times")
def test_explain_names_what_has_no_sparse_kernel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 8))
    resu.sparsify(model, 0.5, compile=False)
    conv, linear = resu.explain(model, torch.randn(2, 3, 6, 6)).sites
    assert (conv.kernel_sparse, conv.reason) == ("dense", "conv2d has no sparse kernel")
    assert conv.dense_ms is None
    assert linear.kernel_sparse == "csr"


@pytest.mark.usefixtures("times")
def test_explain_as_data_and_as_text():
    explanation = resu.explain(resu.sparsify(Net(), 0.5, compile=False), X)
    data = json.loads(json.dumps(explanation.as_dict(), allow_nan=False))
    assert data["sites"][1]["parameter"] == "second"
    assert data["graphs"] == 1
    text = str(explanation)
    assert "2 weight sites in 1 graph(s), on cpu" in text
    assert "dense / csr / dense" in text
    assert "embedding, or tied to one" in text


def test_wrong_arguments():
    with pytest.raises(ArgumentTypeError, match=r"model: expected an nn.Module, got str"):
        resu.explain("model", X)
    with pytest.raises(ArgumentError, match="inputs: expected the inputs of one call, got none"):
        resu.explain(Net())
