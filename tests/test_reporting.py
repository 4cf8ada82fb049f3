from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile import reporting
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.runtime import measure, variants

X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def times(monkeypatch):
    """Times that say which kernel is faster; nothing is measured."""

    def set_times(dense_ms, sparse_ms):
        found = measure.LinearTimes(dense_ms, sparse_ms)
        monkeypatch.setattr(measure, "linear_times", lambda *_, **__: found)
        faster = 63 if sparse_ms < dense_ms else 0
        monkeypatch.setattr(variants, "sparse_buckets", lambda *_, **__: faster)

    set_times(2.0, 1.0)
    return set_times


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Parameter(torch.randn(8, 3))
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        return self.first(x).relu() @ self.second + self.embedding.weight[0, :3]


class Broken(Net):
    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return x @ self.second


# -- report --------------------------------------------------------------------------------------
def test_report_counts_entries_zeros_and_bytes():
    model = resu.sparsify(Net().to(torch.bfloat16), 0.75, compile=False)
    with torch.no_grad():
        model.first.weight[resu.controller(model).masks["first.weight"]] = 0
    report = resu.report(model)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    row = rows["first.weight"]
    assert (row.shape, row.dtype, row.elements) == ((8, 8), "bfloat16", 64)
    assert (row.pruned, row.zeros, row.sparsity) == (48, 64, 0.75)
    assert (row.bytes_dense, row.bytes_packed) == (128, 16 * 2 + 8)
    assert row.note == ""
    assert rows["embedding.weight"].note == "embedding, or tied to one"
    assert rows["first.bias"].pruned == 0
    assert rows["first.bias"].bytes_packed == rows["first.bias"].bytes_dense == 16
    totals = report.as_dict()["total"]
    assert totals["elements"] == sum(p.numel() for p in model.parameters())
    assert totals["zeros"] == sum(int((p == 0).sum()) for p in model.parameters())
    assert totals["pruned"] == 48 + 18 + 48
    assert totals["bytes_dense"] == 2 * totals["elements"]
    assert totals["bytes_packed"] == report.bytes_packed == sum(r.bytes_packed for r in report.rows)


def test_report_agrees_with_the_controller_in_every_phase():
    model = resu.sparsify(Net(), 0.5, compile=False)
    ctl = resu.controller(model)
    assert resu.report(model).phase == "sparse"
    with ctl.resurrect(init="normal"):
        report = resu.report(model)
        assert report.phase == "resu"
        assert report.zeros < report.pruned  # theta is in the pruned places
    ctl.prune(0.0)
    report = resu.report(model)
    assert report.pruned == 0
    assert report.bytes_packed == report.bytes_dense  # packing would not be smaller


def test_report_shows_zeros_that_a_write_would_have_removed():
    model = resu.sparsify(Net(), 0.5, compile=False)
    with torch.no_grad():
        model.second.fill_(1.0)
    (row,) = [row for row in resu.report(model).rows if row.name == "second"]
    assert row.zeros == row.pruned == 12


def test_report_shows_what_was_ever_active():
    model = resu.sparsify(Net(), 0.75, compile=False, targets="first.weight")
    ctl = resu.controller(model)
    report = resu.report(model)
    assert report.ever_share == 0.25  # its first mask, and no other yet
    old = ctl.masks["first.weight"]
    ctl.resurrect(init="normal").__enter__()
    ctl.commit(budget=0.5)
    ever = int((old | ctl.masks["first.weight"]).sum())
    assert ever == 16 + 8
    report = resu.report(model)
    rows = {row.name: row for row in report.rows}
    assert rows["first.weight"].ever_active == ever
    assert rows["unused.weight"].ever_active is rows["unused.weight"].ever_share is None
    assert report.ever_share == report.as_dict()["total"]["ever_share"] == ever / 64
    lines = report.table().splitlines()
    assert "ever active" in lines[0]
    (line,) = [line for line in lines if line.startswith("first.weight")]
    assert "37.50%" in line
    assert "37.50%" in lines[-1]


def test_report_of_a_plain_model():
    report = resu.report(nn.Linear(8, 3))
    assert report.ever_share is None
    assert report.phase == "none"
    assert {row.note for row in report.rows} == {"model is not sparsified"}
    assert report.bytes_packed == report.bytes_dense == 27 * 4


def test_report_of_models_out_of_the_ordinary():
    assert resu.report(nn.Linear(8, 3, device="meta")).zeros == 0
    assert resu.report(nn.LazyLinear(3)).rows == ()
    empty = resu.report(nn.ReLU())
    assert (empty.elements, empty.zeros, empty.bytes_dense) == (0, 0, 0)
    assert "total" in str(empty)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert resu.report(tied).elements == 16
    model = resu.sparsify(Net(), 0.5, compile=False)
    model.late = nn.Linear(2, 2)
    notes = {row.name: row.note for row in resu.report(model).rows}
    assert notes["late.weight"] == "new since the model was sparsified"


def test_report_as_data_and_as_text():
    model = resu.sparsify(Net(), 0.5, compile=False)
    report = resu.report(torch.compile(model, backend="eager"))
    data = json.loads(json.dumps(report.as_dict()))
    assert data["phase"] == "sparse"
    assert {row["name"]: row["sparsity"] for row in data["parameters"]}["first.weight"] == 0.5
    text = str(report)
    assert "8x8" in text
    assert "50.00%" in text
    assert "phase sparse" in text


# -- explain -------------------------------------------------------------------------------------
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
    assert explanation.skipped["unused.weight"] == "masked, but this call multiplies nothing by it"
    assert "first.bias" in explanation.skipped


def test_explain_says_where_dense_wins(times):
    model = resu.sparsify(Net(), 0.75, compile=False)
    times(1.0, 2.0)
    site = resu.explain(model, X).sites[0]
    assert (site.kernel_sparse, site.dense_ms, site.sparse_ms) == ("dense", 1.0, 2.0)
    assert site.reason == "dense measured faster, or too small or dense to gain"
    times(math.nan, math.nan)
    site = resu.explain(model, X).sites[0]
    assert (site.dense_ms, site.sparse_ms) == (None, None)
    assert site.reason == "no sparse kernel for this device, dtype and size"


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize(
    ("threshold", "reason"),
    [
        (1.0, "sparse_threshold=1.0 turns the sparse kernel off"),
        (0.9, "sparsity 75.00% is under sparse_threshold=0.9"),
    ],
)
def test_explain_says_why_a_threshold_keeps_dense(threshold, reason, monkeypatch):
    monkeypatch.setattr(variants, "sparse_buckets", measure.sparse_buckets)
    model = resu.sparsify(Net(), 0.75, compile=False, sparse_threshold=threshold)
    assert resu.explain(model, X).sites[0].reason == reason


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
    with pytest.raises(ArgumentTypeError, match=r"model: expected an nn.Module, got int"):
        resu.report(3)
    with pytest.raises(ArgumentTypeError, match=r"model: expected an nn.Module, got str"):
        resu.explain("model", X)
    with pytest.raises(ArgumentError, match="inputs: expected the inputs of one call, got none"):
        resu.explain(Net())
    assert reporting.report is resu.report
