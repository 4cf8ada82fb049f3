from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import resu_compile as resu
from resu_compile import reporting
from resu_compile.errors import ArgumentTypeError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Parameter(torch.randn(8, 3))
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        return self.first(x).relu() @ self.second + self.embedding.weight[0, :3]


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


def test_wrong_arguments():
    with pytest.raises(ArgumentTypeError, match=r"model: expected an nn.Module, got int"):
        resu.report(3)
    assert reporting.report is resu.report
