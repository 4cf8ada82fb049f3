import pytest
import torch

from resu_compile.errors import ArgumentTypeError
from resu_compile.runtime.commit_report import CommitReport, WeightCommit, compare_masks

REPORT = CommitReport(
    "amnesty", {"a": WeightCommit(10, 3, 1, 2, 7), "b": WeightCommit(20, 5, 2, 2, 11)}
)


def test_counts_of_a_change():
    old = torch.tensor([True, True, False, False])
    new = torch.tensor([True, False, True, False])
    row = compare_masks(old, new)
    assert row == WeightCommit(total=4, kept=1, resurrected=1, lost=1)
    assert row.active == 2
    assert row.churn == 0.5
    assert row.sparsity == 0.5
    assert row.jaccard == pytest.approx(1 / 3)
    assert row.ever_share is None
    assert compare_masks(old, new, 3).ever_share == 0.75


def test_an_empty_weight_has_no_churn():
    row = WeightCommit(total=3, kept=0, resurrected=0, lost=0, ever_active=0)
    assert row.churn == 0.0
    assert row.jaccard == 1.0
    assert row.sparsity == 1.0
    assert row.ever_share == 0.0


def test_totals():
    assert (REPORT.total, REPORT.kept, REPORT.resurrected, REPORT.lost) == (30, 8, 3, 4)
    assert REPORT.active == 11
    assert REPORT.sparsity == pytest.approx(19 / 30)
    assert REPORT.churn == pytest.approx(3 / 11)
    assert REPORT.jaccard == pytest.approx(8 / 15)
    assert REPORT.ever_share == pytest.approx(18 / 30)


def test_data():
    data = REPORT.as_dict()
    assert data["strategy"] == "amnesty"
    assert data["weights"]["b"]["active"] == 7
    assert data["weights"]["total"]["resurrected"] == 3
    assert data["weights"]["a"] == {
        "total": 10,
        "active": 4,
        "kept": 3,
        "resurrected": 1,
        "lost": 2,
        "sparsity": 0.6,
        "churn": 0.25,
        "jaccard": 0.5,
        "ever_active": 7,
        "ever_share": 0.7,
    }


def test_what_nobody_counted_is_left_out():
    report = CommitReport(
        "prune", {"a": WeightCommit(4, 1, 1, 1), "b": WeightCommit(4, 1, 1, 1, 3)}
    )
    assert report.ever_share is None
    assert "ever_share" not in report.as_dict()["weights"]["a"]
    assert report.as_dict()["weights"]["b"]["ever_share"] == 0.75
    assert report.table().splitlines()[2].split() == [
        *["a", "4", "2", "1", "1", "1", "0.5000", "0.3333"]
    ]


def test_table():
    lines = str(REPORT).splitlines()
    head = "weight entries active kept resurrected lost churn jaccard ever"
    assert lines[0].split() == head.split()
    assert lines[-1].split() == [
        *["total", "30", "11", "8", "3", "4", "0.2727", "0.5333", "0.6000"]
    ]


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars[tag, global_step] = scalar_value


def test_tensorboard():
    writer = Writer()
    REPORT.to_tensorboard(writer, 7)
    assert writer.scalars["resu/b/kept", 7] == 5
    assert writer.scalars["resu/total/jaccard", 7] == pytest.approx(8 / 15)
    assert len(writer.scalars) == 3 * 10
    REPORT.to_tensorboard(writer, 8, prefix="run/masks")
    assert writer.scalars["run/masks/total/ever_share", 8] == pytest.approx(0.6)
    with pytest.raises(ArgumentTypeError, match=r"^writer: expected .*add_scalar.*, got list"):
        REPORT.to_tensorboard([], 0)
