"""The benchmarks of whole models run in their smallest form and give finite numbers."""

from __future__ import annotations

import math

import pytest

from benchmarks import results

pytest.importorskip("transformers")


def run(main, path, *arguments):
    main(["--tiny", "--json", str(path), *arguments])
    return results.load(path)


def test_decoding(tmp_path):
    from benchmarks.bench_decode import main

    found = run(main, tmp_path / "decode.json", "--threshold", "0.5", "--head")
    assert found.command == "python -m benchmarks.bench_decode --tiny --threshold 0.5 --head"
    dense, sparse = found.records
    assert (dense["sparsity"], sparse["sparsity"]) == (None, 0.7)
    assert dense["all_bytes"] == dense["all_dense_bytes"]
    # CSR in fp32: 30 % of the entries, 8 bytes each, of 4 dense ones
    assert sparse["masked_bytes"] == pytest.approx(0.6 * sparse["masked_dense_bytes"], rel=0.02)
    assert sparse["all_dense_bytes"] == dense["all_bytes"]
    head = 512 * 128 * 4
    assert sparse["all_dense_bytes"] - sparse["masked_dense_bytes"] < 1.02 * head  # the embedding
    for record in found.records:
        assert record["tokens_per_s"] > 0
        assert record["error"] < 1e-5


def test_loading(tmp_path):
    from benchmarks.bench_loading import main

    (record,) = run(main, tmp_path / "loading.json").records
    parts = (record["masks_s"], record["packing_s"], record["compilation_s"])
    assert all(math.isfinite(part) and part > 0 for part in parts)
    assert record["ready_s"] == pytest.approx(parts[0] + parts[1])


def test_pruning(tmp_path):
    from benchmarks.bench_pruning import main

    found = run(main, tmp_path / "pruning.json")
    ways = {(record["method"], record["way"]) for record in found.records}
    assert {
        ("magnitude", "ours"),
        ("magnitude", "sort"),
        ("wanda", "ours"),
        ("wanda", "topk"),
    } < ways
    assert all(record["seconds"] > 0 for record in found.records)
