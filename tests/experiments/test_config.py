from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.experiments import ExperimentConfig
from resu_compile.experiments.cells import build_cells
from resu_compile.experiments.run_cell import cell_training
from resu_compile.experiments.runner import describe
from resu_compile.experiments.settings import training_config
from resu_compile.training import CycleShares, preset

SEARCH = {"start": [0.05, 0.1, 0.2], "stop": {"low": 0.5, "high": 0.9}}


def names(config):
    return [cell.name.rpartition("-")[0] for cell in build_cells(config)]


def test_cells_of_two_lengths(make_config):
    config = make_config(methods=["dense", "gmp"], sparsities=[0.5, 0.9], lengths=[1, 3])
    assert names(config) == [
        f"linear-{method}-x{length}-seed{seed}"
        for length in (1, 3)
        for seed in (0, 1)
        for method in ("dense-s0", "gmp-s0.5", "gmp-s0.9")
    ]
    assert {cell.length: cell.dense_steps for cell in build_cells(config)} == {1.0: 30, 3.0: 90}


def test_trials_come_first_and_have_another_seed(make_config):
    config = make_config(
        methods=["static", {"name": "gmp", "search": SEARCH}], tuning={"trials": 3, "seed": 77}
    )
    cells = build_cells(config)
    trials = [cell for cell in cells if cell.kind == "trial"]
    assert cells[:3] == trials
    assert [cell.seed for cell in trials] == [77] * 3
    assert trials[0].settings == {}
    assert all(set(cell.settings) == {"start", "stop"} for cell in trials[1:])
    runs = {(c.method.label, c.seed): c for c in cells if c.kind == "run"}
    assert runs["gmp", 0].trials == runs["gmp", 1].trials == tuple(c.key for c in trials)
    assert runs["gmp", 0].settings is None
    assert runs["static", 0].settings == {}
    assert runs["static", 0].trials == ()


def test_keys_name_what_determines_a_run(make_config):
    def keys(**changes):
        return {cell.key for cell in build_cells(make_config(**changes))}

    base = keys()
    assert len(base) == 4
    assert keys(seeds=[0, 1, 2]) > base
    assert keys(sparsities=[0.75, 0.9]) > base
    assert keys(task={"options": {"device": "cuda"}}) == base
    assert keys(output="elsewhere") == base
    for changes in (
        {"task": {"steps": 31}},
        {"task": {"options": {"lr": 0.1}}},
        {"training": {"compile": False, "clip_norm": 1.0}},
        {"budget": "flops"},
        {"methods": [{"name": "gmp", "options": {"every": 10}}, {"name": "rigl", "label": "r"}]},
    ):
        assert not keys(**changes) & base


def test_files(tmp_path):
    data = {
        "tasks": [{"name": "digits_mlp", "steps": 40}],
        "methods": ["dense", {"name": "resu", "training": {"preset": "default", "cycles": 2}}],
        "sparsities": [0.5],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    pytest.importorskip("yaml").safe_dump(data, (tmp_path / "a.yaml").open("w"))
    first = ExperimentConfig.load(tmp_path / "a.json")
    assert first == ExperimentConfig.load(tmp_path / "a.yaml")
    assert first.results.name == "results.jsonl"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["rgl"]}, "method: expected one of acdc, dense, gmp"),
        ({"methods": ["gmp", "gmp"]}, "methods: expected each once, got 'gmp' twice"),
        ({"methods": [{"name": "gmp", "options": {"evry": 3}}]}, "did you mean 'every'"),
        (
            {"methods": [{"name": "gmp", "training": {"steps": 3}}]},
            "training of method gmp: expected no 'steps'",
        ),
        ({"methods": [{"name": "dense", "search": SEARCH}]}, "dense: expected no settings"),
        ({"methods": [{"name": "gmp", "search": {"start": []}}]}, "expected a list of values"),
        (
            {"methods": [{"name": "gmp", "search": {"start": {"low": 2, "high": 1}}}]},
            "expected low < high",
        ),
        ({"methods": [{"name": "gmp", "search": {"strt": [1]}}]}, "did you mean 'start'"),
        ({"methods": [{"name": "gmp", "search": {"stop": [0.5, 2.0]}}]}, "stop: expected a number"),
        ({"sparsities": [0.0]}, "sparsities: expected numbers in (0, 1), got 0"),
        ({"seeds": [1, 1]}, "seeds: expected each once"),
        ({"lengths": [0]}, "lengths: expected numbers above 0"),
        ({"budget": "time"}, "budget: expected one of flops, steps"),
        ({"max_stretch": 0.5}, "max_stretch"),
        ({"tuning": {"trials": 2, "seed": 1}}, "tuning.seed: expected none of the reported seeds"),
        ({"training": {"steps": 5}}, "training: expected no 'steps', got 5"),
        (
            {"training": {"early_stop": {"metric": "loss"}, "evaluate_every": 5}},
            "training: expected no 'early_stop'",
        ),
        (
            {"methods": [{"name": "gmp", "search": {"training.steps": [5]}}]},
            "search of method gmp, training: expected no 'steps'",
        ),
        ({"methods": ["json:JSONDecoder"]}, "expected a class that inherits"),
        ({"methods": ["no_such_module:Method"]}, "method 'no_such_module:Method': expected a mod"),
        (
            {"methods": [{"name": "resu", "training": {"densify": {}}}]},
            "training of method resu: expected no 'densify'",
        ),
        ({"training": {"stepz": 5}}, "unknown setting 'stepz'"),
        ({"task": {"steps": 0}}, "steps of task linear"),
        ({"task": {"label": "a/b"}}, "label of task"),
        ({"task": {"step": 3}}, "unknown setting of tasks 'step'"),
        ({"metods": []}, "did you mean 'methods'"),
        ({"tasks": "digits"}, "tasks: expected a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used(make_config, changes, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=re.escape(message)):
        make_config(**changes)


def test_settings_change_the_method_and_the_training():
    training = {"cycles": 2, "cycle": {"resu": 0.5}}
    config = training_config(
        "resu",
        steps=100,
        sparsity=0.5,
        seed=3,
        options={"criterion": "magnitude"},
        training=training,
        settings={"criterion": "random", "training.cycle.train": 0.1, "training.warmup": 0.2},
    )
    assert (config.cycle.resu, config.cycle.train, config.warmup) == (0.5, 0.1, 0.2)
    assert config.method_options == {"criterion": "random"}
    assert (config.steps, config.seed) == (100, 3)
    assert training == {"cycles": 2, "cycle": {"resu": 0.5}}


@pytest.mark.parametrize("base", ["default", "published"])
def test_fields_of_resurrection_are_changed_one_by_one(make_config, base):
    """In what all runs have, in a method's own training, and in a search."""
    config = make_config(
        training={"compile": False, "resurrection": {"weight_decay": 0.1, "delta": 1e-6}},
        methods=[
            {
                "name": "resu",
                "training": {"preset": base, "resurrection": {"weight_decay": 0.2}},
                "search": {"training.resurrection.lr": [0.5]},
            }
        ],
        tuning={"trials": 2},
        task={"steps": 400},
    )
    trials = [cell for cell in build_cells(config) if cell.kind == "trial"]
    lrs = []
    for cell in trials:
        found = cell_training(cell, config, cell.settings, 400).resurrection
        whole = preset(base).resurrection
        lr, rule = cell.settings.get("training.resurrection.lr", whole.lr), whole.rule
        if base == "default" and lr is not None:
            rule = "adam"  # which is what a step size of its own makes of it
        assert found == replace(whole, weight_decay=0.2, delta=1e-6, lr=lr, rule=rule)
        lrs.append(lr)
    assert lrs == [preset(base).resurrection.lr, 0.5]


def test_shares_of_a_cycle_are_changed_one_by_one(make_config):
    config = make_config(
        training={"compile": False, "cycle": {"train": 0.5}},
        methods=[{"name": "resu", "training": {"cycle": {"stabilize": 0.25}}}],
        task={"steps": 400},
    )
    (cell,) = [cell for cell in build_cells(config) if cell.kind == "run"][:1]
    assert cell_training(cell, config, {}, 400).cycle == CycleShares(0.5, 0.25, 1.0)


def test_dense_has_a_mask_of_ones():
    config = training_config(
        "dense", steps=10, sparsity=0.9, seed=0, training={"compile": False, "preset": "published"}
    )
    assert (config.sparsity, config.compile) == (0.0, False)


def test_settings_of_a_trial_that_do_not_go_together(make_config):
    """Twenty cycles have room in 40 steps, but not after a warm-up of 16."""
    search = {"training.cycles": [20], "training.warmup": [0.4]}
    config = make_config(
        methods=[{"name": "resu", "training": {"cycles": 2, "warmup": 0.1}, "search": search}],
        task={"steps": 40},
        tuning={"trials": 4},
    )
    with pytest.raises(ArgumentError, match="steps: expected at least"):
        describe(config)
