"""The tables and plots of docs/performance.md are those of the stored results."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import performance_page, plot_performance
from benchmarks.performance_page import PAGE, PageError, fill, losing, names_of
from benchmarks.results import Result, ResultError, load

MACHINE = {"device": "Test device", "torch": "2.11"}


def cell(rows, sparsity, kernel, us, dense_us=10.0):
    numel, kept = 64 * 32, 1 - sparsity
    return {
        "name": "w",
        "N": 64,
        "K": 32,
        "M": rows,
        "sparsity": sparsity,
        "kernel": kernel,
        "us": us,
        "bytes": int(numel * (2 * kept + (1 / 8 if sparsity else 0))),
        "speedup": dense_us / us,
        "flop_per_s": 2.0 * rows * numel * kept / us * 1e6,
    }


CELLS = [
    cell(1, 0.0, "dense cublas", 10.0),
    cell(8, 0.0, "dense cublas", 10.0),
    cell(1, 0.5, "rows", 12.0),
    cell(1, 0.5, "tiles", 8.0),
    cell(8, 0.5, "tiles", 12.5),
    cell(1, 0.9, "rows", 2.5),
    cell(8, 0.9, "tiles", 5.0),
]
CEILINGS = {"ceilings": {"read": 4e9, "copy": 4e9, "flop": 1e12}}
RESULT = Result("Products", "command", ["a"], [["b"]], [*CELLS, CEILINGS], MACHINE)


# -- the page --------------------------------------------------------------------------------
def test_the_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert names_of(text)
    assert fill(text) == text


def test_the_plots_of_the_page_exist():
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert linked
    for path in linked:
        root = ElementTree.parse(PAGE.parent / path).getroot()
        assert root.tag.endswith("svg")


def test_a_region_is_replaced_and_the_rest_stays(tmp_path):
    RESULT.save(tmp_path / "r.json")
    text = "before\n<!-- begin r -->\nold\n<!-- end r -->\nafter\n"
    filled = fill(text, tmp_path)
    assert "old" not in filled
    assert "| a |\n| --- |\n| b |" in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert fill(filled, tmp_path) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin r -->\n", "expected an end for each region"),
        ("<!-- begin x -->\n<!-- end x -->", r"expected .*x\.json; results stored: r"),
        ("<!-- begin r:y -->\n<!-- end r:y -->", "expected a view of"),
    ],
)
def test_a_region_that_cannot_be_filled_is_an_error(tmp_path, text, message):
    RESULT.save(tmp_path / "r.json")
    with pytest.raises(PageError, match=message):
        fill(text, tmp_path)


def test_only_products_that_lose_with_every_kernel_are_listed():
    text = losing(RESULT)
    assert "in 1 of 4 products" in text
    assert "- w, 50%: M=8 (0.80x)" in text
    assert "M=1" not in text


def test_nothing_lost_is_said():
    won = Result("t", "c", ["a"], [], [c for c in CELLS if c["speedup"] >= 1], MACHINE)
    assert losing(won) == "Dense is faster in none of the 3 products measured."


def test_a_region_may_show_a_part_of_the_suite(tmp_path):
    records = [
        {"group": group, "impl": impl, "us": 5.0, "spread": 0.1, "ratio": ratio, "bytes": 0}
        for group in ("top-k mask, 1", "top-k mask, 2", "pack")
        for impl, ratio in (("torch", None), ("op", 2.0))
    ]
    Result("Ratios", "suite", [], [], records, MACHINE).save(tmp_path / "s.json")
    text = fill("<!-- begin s:only=top-k_mask -->\n<!-- end s:only=top-k_mask -->", tmp_path)
    assert "Ratios. Test device, torch 2.11." in text
    assert "`python -m benchmarks.suite -k 'top-k mask'`" in text
    assert text.count("2.00x") == 2
    assert "pack" not in text
    with pytest.raises(PageError, match="expected groups that begin with 'none'"):
        fill("<!-- begin s:only=none -->\n<!-- end s:only=none -->", tmp_path)


# -- plots -----------------------------------------------------------------------------------
def test_the_fastest_kernel_is_drawn():
    best = plot_performance.fastest(CELLS)
    assert [c["kernel"] for c in best if c["M"] == 1 and c["sparsity"] == 0.5] == ["tiles"]


def test_the_limit_is_that_of_the_bytes():
    assert plot_performance.byte_limit(CELLS, 0.5) == pytest.approx(2 / 1.125)
    assert plot_performance.intensity(CELLS[0]) == pytest.approx(1.0)


def test_plots_are_written_and_come_out_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    RESULT.save(tmp_path / "r.json")
    first = plot_performance.save_plots(load(tmp_path / "r.json"), tmp_path / "a")
    again = plot_performance.save_plots(RESULT, tmp_path / "b")
    assert [p.name for p in first] == ["speedup_test-device.svg", "roofline_test-device.svg"]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        text = "".join(ElementTree.parse(one).getroot().itertext())
        assert "Test device" in text


def test_a_result_without_products_is_refused():
    with pytest.raises(ResultError, match="expected records with a speedup"):
        plot_performance.cells_of(Result("t", "c", ["a"], [], [], MACHINE))
    with pytest.raises(ResultError, match="expected a record of ceilings"):
        plot_performance.ceilings_of(Result("t", "c", ["a"], [], CELLS, MACHINE))


def test_check_says_when_the_page_is_old(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin sparse_linear_cpu -->\n0\n<!-- end sparse_linear_cpu -->\n")
    monkeypatch.setattr(performance_page, "PAGE", page)
    assert performance_page.main(["--check"]) == 1
    assert "not up to date" in capsys.readouterr().out
    assert performance_page.main([]) == 0
    assert performance_page.main(["--check"]) == 0
