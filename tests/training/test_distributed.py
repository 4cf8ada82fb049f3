"""Two ranks with gloo: one model, one writer, one decision. What the ranks do is in ranks.py."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import resu_compile as resu
from resu_compile.errors import ArgumentError
from resu_compile.training import distributed, read_stats
from resu_compile.training.checkpoint import list_checkpoints, load_checkpoint
from tests.training import ranks
from tests.training.models import make_batches, make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(ranks.main, args=(port, str(path)), nprocs=2)
    return path


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_agree(found, *keys):
    """Weights, masks and generators of the two ranks are the same bits."""
    first, second = found
    for key in keys:
        first, second = first[key], second[key]
    assert_equal(first["weights"], second["weights"])
    assert_equal(first["masks"], second["masks"])
    assert torch.equal(first["generator"], second["generator"])


@pytest.mark.parametrize("method", ["set", "rigl", "snfs", "sr_ste"])
def test_training_methods_choose_the_same_masks(found, method):
    assert_agree(found, method)
    assert found[0][method]["grown"] == found[1][method]["grown"] > 0
    masks = found[0][method]["masks"].values()
    assert abs(sum(int(mask.sum()) for mask in masks) - 48) <= 2


@pytest.mark.parametrize("given", ["wrapped", "closure", "places", "hidden"])
def test_two_ranks_are_one_process_with_all_their_batches(found, given):
    assert_agree(found, given)
    changes = {"places": ranks.PLACES, "hidden": ranks.HIDDEN}.get(given, {})
    trainer = make_trainer(changes={"accumulate": 4, **changes})
    result = trainer.fit(make_batches(12))
    run = found[0][given]
    masks = resu.controller(trainer.model).masks
    assert_equal(run["masks"], masks)
    assert min(int((~mask).sum()) for mask in masks.values()) > 0
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(run["weights"][name], value, rtol=1e-4, atol=1e-5)
    losses = [record["loss"] for record in result.stats if record["event"] == "step"]
    assert run["losses"] == pytest.approx(losses, rel=1e-4)
    assert found[1][given]["losses"] == run["losses"]
    assert run["commits"] == ranks.resurrections(result)
    assert sum(run["commits"]) > 0


def test_gradients_are_averaged_once_a_step(found):
    assert found[0]["wrapped"]["reductions"] == 40
    assert found[0]["closure"]["reductions"] == 80  # the trainer does not see the wrapper


def test_a_resumed_resu_phase_is_the_same_on_each_rank(found):
    for run in (of_rank["resumed"] for of_rank in found):
        assert_equal(run["whole"]["weights"], run["again"]["weights"])
        assert_equal(run["whole"]["masks"], run["again"]["masks"])
        assert run["same history"]
        assert run["steps"] == 40
        assert run["epoch"] == 3  # eleven batches in each; the sampler was told
        assert torch.equal(run["random"], run["random again"])
    assert_agree(found, "resumed", "again")
    assert not torch.equal(found[0]["resumed"]["random"], found[1]["resumed"]["random"])


def test_rank_0_alone_writes(found, folder):
    assert [run["resumed"]["writes"] for run in found] == [4, 0]
    steps = [path.name for path in list_checkpoints(folder / "whole")]
    assert steps == [f"step-{step:08d}" for step in (12, 24, 36, 40)]
    records = read_stats(folder / "whole.jsonl")
    assert sum(record["event"] == "start" for record in records) == 1
    assert sum(record["event"] == "end" for record in records) == 1
    assert read_stats(folder / "half.jsonl") == records
    assert [run["resumed"]["bars"] for run in found] == [[True], [False]]


def test_another_number_of_ranks_is_an_error(folder, found):
    del found  # the ranks have to be done
    state = load_checkpoint(folder / "whole")
    assert len(state["trainer"]["ranks"]) == 2
    with pytest.raises(ArgumentError, match=r"state: expected 2 rank\(s\).* got 1"):
        make_trainer().load(state)


@pytest.mark.parametrize("name", ["wanda", "wanda++", "score"])
def test_ranks_agree_though_their_calibration_data_differ(found, name):
    assert_agree(found, name)
    first, second = (run[name] for run in found)
    differed = 0
    for ours, theirs, mine, yours in zip(
        first["choices"], second["choices"], first["agreed"], second["agreed"], strict=True
    ):
        assert_equal(ours, mine)  # rank 0 decides
        assert_equal(mine, yours)
        differed += any(not torch.equal(ours[key], theirs[key]) for key in ours)
    assert differed > 0
    for key, mask in second["masks"].items():
        assert (second["weights"][key][~mask] == 0).all()


def test_masks_from_before_are_those_of_rank_0(found):
    before = [run["found"]["before"] for run in found]
    assert not torch.equal(before[0]["0.weight"], before[1]["0.weight"])
    for run in found:
        assert_equal(run["found"]["begun"], before[0])
    assert_agree(found, "found")
    assert_agree(found, "found", "synced")
    assert_equal(found[1]["found"]["synced"]["masks"], before[0])


def test_a_loop_of_ones_own(found):
    assert_agree(found, "own loop")
    assert all(run["own loop"]["is plain"] and run["own loop"]["agrees no more"] for run in found)


def test_rank_0_decides_when_to_stop(found):
    first, second = (run["early stop"] for run in found)
    assert first == second
    assert first["stopped"]
    assert first["plain"]
    assert first["steps"] < 40
    assert set(first["heard"]) == {1.0}


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("nan", "at optimizer step 7 on rank 1;", None),
        ("no wrapper", "model: expected the same gradients on all ranks, got norms", None),
        ("used", "expected a folder without checkpoints", "ResuCompileError: rank 0 failed: Argu"),
        ("full", "OSError: disk full", "ResuCompileError: rank 0 failed: OSError: disk full"),
        ("folder", "on all ranks, got those of steps 40, None;", None),
        ("wrapper sparsified", "model: expected the model inside DistributedDataParallel", None),
        ("group", "over all 2 ranks, got one over a process group of 1", None),
    ],
)
def test_errors_come_on_both_ranks(found, name, first, second):
    messages = [run["errors"][name] for run in found]
    assert first in messages[0]
    assert (second or first) in messages[1]


def test_the_example_of_the_documentation(found):
    assert_agree(found, "example")
    assert found[0]["example"]["steps"] == 40


def test_alone_everything_stays_as_it_is():
    model = nn.Linear(4, 2)
    value, masks = torch.ones(()), {"weight": torch.ones(2, 4, dtype=torch.bool)}
    assert (distributed.world_size(), distributed.rank(), distributed.is_first()) == (1, 0, True)
    assert distributed.gather(3) == [3]
    assert distributed.from_first("a") == "a"
    assert distributed.on_first(lambda: 5) == 5
    assert torch.equal(distributed.mean(value), value)
    assert distributed.plain_model(model) is model
    resu.sparsify(model, 0.5, compile=False)
    controller = resu.controller(model)
    assert distributed.masks_of_first(controller, masks) is masks
