"""The demo on tiny models: what it trains, counts, writes and checks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.demo import deploy
from resu_compile.demo.runner import DemoConfig, comparison_table, methods, run_demo
from resu_compile.demo.tasks import Bytes, Digits, Training
from resu_compile.demo.training import Method, train
from resu_compile.errors import ResuCompileError

TRAINING = Training(150, batch_size=32, lr=1e-2, weight_decay=0.01, ramp=(0.2, 0.7), prunings=6)


@pytest.fixture(scope="module")
def digits():
    return Digits(TRAINING, width=24)


@pytest.fixture
def config(tmp_path):
    return DemoConfig(tmp_path / "out", compiled=False)


def by_key(config: DemoConfig) -> dict[str, Method]:
    return {method.key: method for method in methods(TRAINING, config)}


@pytest.mark.parametrize("key", ["one_shot", "gradual", "resu"])
def test_reaches_the_sparsity_and_keeps_it(digits, config, key):
    run = train(digits, by_key(config)[key], seed=0, compiled=False)
    control = resu.controller(run.model)
    assert control.phase is resu.Phase.SPARSE
    assert run.sparsity == pytest.approx(0.7, abs=0.01)
    masks = control.masks
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    if key == "resu":  # ranks over all layers
        total = sum(mask.numel() for mask in masks.values())
        assert sum(kept.values()) == int((1 - 0.7) * total)
    else:
        assert kept == {name: int((1 - 0.7) * mask.numel()) for name, mask in masks.items()}
    for name, mask in masks.items():
        assert torch.count_nonzero(run.model.get_parameter(name)[~mask]) == 0
    assert run.score.metric > 0.5  # chance is 0.1


def test_resurrects(digits, config):
    method = by_key(config)["resu"]
    quota = replace(method.config, resurrection=ResurrectionConfig(), budget_end=0.05)
    method = replace(method, config=quota)
    run = train(digits, method, seed=0, compiled=False)
    assert run.resurrections > 0
    assert 0.0 < run.resurrected_share <= 1.0


def test_others_resurrect_nobody(digits, config):
    for key in ("dense", "one_shot", "gradual"):
        run = train(digits, by_key(config)[key], seed=0, compiled=False)
        assert run.resurrections == 0
        assert run.resurrected_share == 0.0


def test_a_seed_gives_the_same_run(digits, config):
    method = by_key(config)["resu"]
    a, b, other = (train(digits, method, seed=s, compiled=False) for s in (1, 1, 2))
    assert a.curve == b.curve
    assert a.curve != other.curve
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_every_method_has_the_same_start_and_steps(digits, config):
    compared = by_key(config)
    assert [key for key, method in compared.items() if not method.plan] == ["dense"]
    assert {m.plan[-1].stop for m in compared.values() if m.plan} == {TRAINING.steps}
    curves = {
        key: train(digits, method, seed=0, compiled=False).curve for key, method in compared.items()
    }
    assert {curve[-1][0] for curve in curves.values()} == {TRAINING.steps}
    first = {key: curve[0] for key, curve in curves.items()}  # all are dense that early
    assert len(set(first.values())) == 1


def test_demo_end_to_end(digits, config, capsys):
    training = Training(100, batch_size=4, lr=1e-2, weight_decay=0.1, ramp=(0.2, 0.8))
    text = Bytes(training, width=32, layers=1, heads=2, context=16, eval_batches=1)
    results = run_demo([digits, text], config)

    printed = capsys.readouterr().out
    assert comparison_table(results) in printed
    assert printed.count("outputs agree") == 2
    assert {path.name for path in config.output.iterdir()} == {
        "results.json",
        "learning_curves.png",
        "digits.pt2",
        "bytes.pt2",
    }
    numbers = json.loads((config.output / "results.json").read_text())
    for name in ("digits", "bytes"):
        found = numbers["tasks"][name]["methods"]
        assert set(found) == {"dense", "one_shot", "gradual", "resu"}
        assert found["resu"]["resurrections"] > 0
        assert found["resu"]["bytes_packed"] < found["dense"]["bytes_packed"]
        assert all(entry["inference_ms"] > 0 for entry in found.values())
        assert numbers["tasks"][name]["export"]["agrees"]


def test_a_wrong_export_is_noticed(digits, config, tmp_path, monkeypatch):
    run = train(digits, by_key(config)["one_shot"], seed=0, compiled=False)
    export = resu.export

    def export_another(model, *args, **kwargs):
        with torch.no_grad():
            model.fc3.bias += 0.1
        report = export(model, *args, **kwargs)
        with torch.no_grad():
            model.fc3.bias -= 0.1
        return report

    monkeypatch.setattr(deploy.resu, "export", export_another)
    check = deploy.export_and_check(digits, run.model, tmp_path / "wrong.pt2")
    assert not check.agrees
    assert check.max_difference == pytest.approx(0.1, rel=0.01)


def test_a_failing_process_is_reported(digits, config, tmp_path, monkeypatch):
    run = train(digits, by_key(config)["one_shot"], seed=0, compiled=False)
    monkeypatch.setattr(deploy.resu, "export", lambda model, inputs, path: path.write_bytes(b""))  # noqa: ARG005
    with pytest.raises(ResuCompileError, match="loading it in a new process failed"):
        deploy.export_and_check(digits, run.model, tmp_path / "empty.pt2")
