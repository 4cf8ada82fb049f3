"""Masks of many weights held as bits."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from resu_compile.config import SparsityConfig
from resu_compile.runtime import allocation
from resu_compile.runtime.allocation import new_generator, new_masks
from resu_compile.runtime.packed_masks import PackedMasks
from resu_compile.selection import named_weights


def test_reads_what_was_put_in_and_holds_bits():
    masks = {"a": torch.rand(3, 5) < 0.5, "b": torch.rand(7) < 0.5}
    held = PackedMasks(masks.items())
    assert list(held) == ["a", "b"]
    assert all(held[name].equal(mask) for name, mask in masks.items())
    assert held.size_bytes == 2 + 1
    assert list(held.only(["b"])) == ["b"]
    with pytest.raises(KeyError):
        held["c"]
    assert held.take("a").equal(masks["a"])
    assert list(held) == ["b"]
    assert held.size_bytes == 1


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_one_score_is_alive_at_a_time(pattern, monkeypatch):
    """What ranks in each weight alone holds the scores of one weight, not of the model."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    alive: list[int] = []
    score = allocation.score_of

    def counted(*args, **kwargs):
        found = score(*args, **kwargs).clone()
        alive.append(1)
        weakref.finalize(found, alive.pop)
        assert len(alive) == 1
        return found

    monkeypatch.setattr(allocation, "score_of", counted)
    config = SparsityConfig(pattern=pattern) if pattern else SparsityConfig(sparsity=0.5)
    masks = new_masks(named_weights(model), config, new_generator(0))
    assert [int(mask.sum()) for mask in masks.values()] == [32] * 5
    assert alive == []
