"""Configs: what presets say, what files hold, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import get_method
from resu_compile.training import (
    PRESETS,
    CheckpointConfig,
    CycleShares,
    Densification,
    EarlyStop,
    Pause,
    Stage,
    TrainingConfig,
    build_plan,
    preset,
)
from tests.training.models import config


@pytest.mark.parametrize(
    ("name", "sparsity", "cycles", "steps_a_cycle", "budget"),
    [
        ("published", 0.7, 5, 1000, (0.10, 0.02)),
        ("aggressive", 0.9, 7, 2000, (0.15, 0.05)),
        ("conservative", 0.5, 3, 500, (0.20, 0.02)),
        ("densification", 0.0, 5, 1000, (0.30, 0.10)),
        ("quick_test", 0.5, 2, 100, (0.10, 0.02)),
    ],
)
def test_published_presets_have_the_published_numbers(
    name, sparsity, cycles, steps_a_cycle, budget
):
    found = preset(name)
    assert found.sparsity == sparsity
    assert found.cycles == cycles
    assert found.steps == cycles * steps_a_cycle
    assert (found.budget_start, found.budget_end) == budget
    assert found.cycle == CycleShares(train=0.6, stabilize=0.1, resu=0.3)
    assert (found.warmup, found.recovery) == (0.0, 0.0)
    theta = found.resurrection
    assert theta.freeze_active
    assert theta.rule == ("sgd" if name == "conservative" else "selective")
    assert theta.step == "raw"
    assert (theta.init, theta.eps, theta.lr) == ("normal", 0.1, 1e-4)
    assert (theta.screen, theta.select, theta.tau, theta.betas[0]) == (0.5, 0.2, 0.5, 0.9)


def test_the_default_preset_warms_up_recovers_and_trains_theta_beside_the_rest():
    found = preset("default")
    assert found == TrainingConfig()
    assert build_plan(found)[0].stage is Stage.WARMUP
    assert found.recovery > 0
    assert found.schedule == "auto"
    assert (found.method, found.scope) == ("saliency", "global")
    theta = found.resurrection
    assert (theta.rule, theta.init, theta.freeze_active) == ("optimizer", "zero", False)
    assert theta.hidden
    assert (theta.strategy, theta.score, theta.places) == ("open", "saliency", None)
    assert 0.0 == found.budget_end < found.budget_start


def test_a_mapping_of_shares_keeps_the_others():
    assert TrainingConfig.from_dict({"cycle": {"stabilize": 0.5}}).cycle == CycleShares(
        0.0, 0.5, 1.0
    )
    published = TrainingConfig.from_dict({"preset": "published", "cycle": {"resu": 0.5}})
    assert published.cycle == CycleShares(0.6, 0.1, 0.5)


def test_the_densification_preset_steps_down_and_pauses():
    densify = preset("densification").densify
    assert densify.levels == (0.7, 0.5, 0.3, 0.1, 0.0)
    assert [pause.after_cycle for pause in densify.pauses] == [0, 1, 2, 3]


def test_a_preset_takes_changes_and_refuses_unknown_ones():
    found = preset("published", steps=2000, sparsity=0.9)
    assert (found.steps, found.sparsity, found.budget_start) == (2000, 0.9, 0.1)
    with pytest.raises(ArgumentError, match=r"unknown setting 'step' \(did you mean 'steps'"):
        preset("published", step=3)
    with pytest.raises(ArgumentError, match="preset: expected one of aggressive, conservative"):
        preset("publshed")


# -- as data -----------------------------------------------------------------------------------
FULL = {
    "steps": 600,
    "cycle": CycleShares(1, 2, 3),
    "sparsity": 0.0,
    "overrides": {},
    "targets": ("0.weight",),
    "exclude": None,
    "resurrection": ResurrectionConfig(lr=1e-5, betas=(0.8, 0.9), freeze_active=True),
    "densify": Densification(start=0.5, pauses=(Pause(0, "play", 7), Pause(2))),
    "clip_norm": 1.0,
    "autocast": "bfloat16",
    "evaluate_every": 3,
    "early_stop": EarlyStop("loss", mode="max", min_delta=1e-7),
    "checkpoint": CheckpointConfig("there", every=4, keep=5),
    "stats": "stats.jsonl",
}


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
@pytest.mark.parametrize(
    "made",
    [
        *[pytest.param(preset(name), id=name) for name in PRESETS],
        pytest.param(TrainingConfig(**FULL), id="full"),
        pytest.param(config(schedule=(0.1, 0.2, 0.75), overrides={"0.*": 0.5}), id="custom"),
    ],
)
def test_files_round_trip(made, suffix, tmp_path):
    path = tmp_path / f"config.{suffix}"
    made.dump(path)
    assert TrainingConfig.load(path) == made
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()


def test_a_hand_written_file_names_a_preset_and_changes_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "preset: aggressive\nsteps: 700\nresurrection: {lr: 1e-3}\ncycle: {train: 1, resu: 1.}\n"
    )
    assert TrainingConfig.load(path) == preset(
        "aggressive",
        steps=700,
        resurrection=replace(preset("aggressive").resurrection, lr=1e-3),
        cycle=CycleShares(1, 0.1, 1.0),
    )


TRIAL = {"hidden": True, "strategy": "open", "score": "saliency", "kind": "ceiling"}
SEEN = {**TRIAL, "hidden": False}
FROZEN = {"lr": 1e-4, "step": "raw", "init": "normal", "eps": 0.1, "freeze_active": True}


@pytest.mark.parametrize(
    ("base", "named", "whole"),
    [
        (None, {}, TRIAL),
        (None, {"margin": 0.2}, {**TRIAL, "margin": 0.2}),
        (None, {"freeze_active": True}, {**TRIAL, "freeze_active": True, "rule": "adam"}),
        (None, {"lr": 1e-3}, {**TRIAL, "lr": 1e-3, "rule": "adam"}),
        (
            None,
            {"storage": "compact", "hidden": False},
            {**SEEN, "storage": "compact", "rule": "adam"},
        ),
        (None, {"init": "normal"}, {**TRIAL, "init": "normal"}),
        (
            None,
            {"strategy": "amnesty", "score": "growth", "kind": "quota"},
            {"hidden": True, "score": "growth"},
        ),
        ("default", {"places": 0.1, "hidden": False}, {**SEEN, "places": 0.1}),
        ("published", {}, {**FROZEN, "rule": "selective"}),
        ("published", {"tau": 0.1}, {**FROZEN, "rule": "selective", "tau": 0.1}),
        ("conservative", {"lr": None}, {**FROZEN, "rule": "sgd", "lr": None}),
        (
            "densification",
            {"freeze_active": False, "lr": None, "rule": "auto"},
            {**FROZEN, "rule": "optimizer", "lr": None, "freeze_active": False},
        ),
    ],
)
def test_a_mapping_changes_the_fields_that_it_names(base, named, whole, tmp_path):
    data = {"resurrection": named} if base is None else {"preset": base, "resurrection": named}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    found = TrainingConfig.load(path)
    assert found.resurrection == ResurrectionConfig(**whole)
    rest = TrainingConfig() if base is None else preset(base)
    assert found == replace(rest, resurrection=found.resurrection)
    found.dump(path)
    assert TrainingConfig.load(path) == found
    if base is not None:
        assert preset(base, resurrection=named) == found


@pytest.mark.parametrize("name", PRESETS)
def test_an_object_stays_whole(name):
    theta = ResurrectionConfig(margin=0.2)
    assert preset(name, resurrection=theta).resurrection is theta
    assert TrainingConfig.from_dict({"preset": name, "resurrection": theta}).resurrection is theta


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"places": 0.1}, r"^places: .*'hidden: false'"),
        ({"storage": "compact"}, r"^storage: .*'hidden: false'"),
        ({"hidden": False, "places": 0.1, "init": "normal"}, r"^places: .*'places: null'"),
        ({"hidden": False, "places": 0.1, "rule": "subset"}, r"^places: .*'places: null'"),
        ({"score": "growth"}, "^score: .*kind='quota'.*set these two, or another score"),
        ({"lr": 1e-3, "rule": "optimizer"}, "^lr: .*'lr: null'"),
    ],
)
def test_contradictions_to_the_default_say_what_to_set(data, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingConfig.from_dict({"resurrection": data})


def test_an_open_contest_needs_scores():
    with pytest.raises(ArgumentError, match=r"^resurrection\.strategy: .*'wanda'.*'reprune'"):
        TrainingConfig(method="wanda")
    TrainingConfig.from_dict({"method": "wanda", "resurrection": {"strategy": "reprune"}})


def test_an_empty_file_is_the_default(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("# nothing\n")
    assert TrainingConfig.load(path) == TrainingConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sparsty": 0.5}, r"unknown setting 'sparsty' \(did you mean 'sparsity'"),
        ({"cycle": {"trian": 1}}, r"unknown setting of cycle 'trian' \(did you mean 'train'"),
        ({"resurrection": {"lrr": 1}}, "unknown setting of resurrection 'lrr'"),
        ({"sparsity": 0.0, "densify": {"pauses": [{"after": 1}]}}, "setting of pauses 'after'"),
        ({"early_stop": {"patience": 3}}, r"early_stop\.metric: expected a value, got none"),
        ({"checkpoint": {}}, r"checkpoint\.folder: expected a value, got none"),
    ],
)
def test_unknown_and_missing_settings_are_named(data, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingConfig.from_dict(data)


def score(_name, weight):
    return weight.abs()


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"schedule": lambda t: t}, "schedule"),
        ({"resurrection": ResurrectionConfig(score=score)}, r"resurrection\.score"),
        ({"method": get_method("magnitude")}, "method"),
        ({"targets": lambda *_: True}, "targets"),
    ],
)
def test_what_is_no_data_is_not_dumped_but_described(changes, place, tmp_path):
    made = config(**changes)
    with pytest.raises(ArgumentError, match=f"^{place}: expected plain data"):
        made.dump(tmp_path / "config.json")
    assert not (tmp_path / "config.json").exists()
    assert "0x" not in json.dumps(made.describe())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"\.yaml, \.yml or \.json, got .*config\.toml"):
        TrainingConfig().dump(tmp_path / "config.toml")
    broken = tmp_path / "config.yaml"
    broken.write_text("steps: [1\n")
    with pytest.raises(ArgumentError, match=r"config\.yaml: expected YAML, got"):
        TrainingConfig.load(broken)
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ArgumentError, match="expected JSON, got"):
        TrainingConfig.load(broken)
    broken.write_text("[1]")
    with pytest.raises(ArgumentTypeError, match="expected a mapping of settings"):
        TrainingConfig.load(broken)


def test_yaml_without_pyyaml_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ArgumentError, match=r"pip install resu-compile\[train\], or use \.json"):
        TrainingConfig().dump(tmp_path / "config.yaml")


def test_importing_it_imports_nothing_optional():
    code = (
        "import sys, torch; torch_brings = set(sys.modules); "
        "import resu_compile; assert 'resu_compile.training' not in sys.modules; "
        "import resu_compile.training; new = set(sys.modules) - torch_brings; "
        "print(sorted(new & {'yaml', 'tqdm', 'safetensors', 'matplotlib', 'gymnasium'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_yaml_file_cannot_make_objects(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("stats: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ArgumentError, match="expected YAML"):
        TrainingConfig.load(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ArgumentError, "steps: expected an integer >= 1, got 0"),
        ({"steps": 40.0}, ArgumentTypeError, "steps: expected an integer"),
        ({"warmup": 1.0}, ArgumentError, r"warmup: expected a number in \[0, 1\)"),
        ({"recovery": -0.1}, ArgumentError, "recovery: "),
        ({"sparsity": 1.0}, ArgumentError, "sparsity: "),
        ({"budget_end": 1.1}, ArgumentError, "budget_end: "),
        ({"accumulate": 0}, ArgumentError, "accumulate: "),
        ({"clip_norm": -1.0}, ArgumentError, "clip_norm: "),
        ({"autocast": "bf16"}, ArgumentError, "autocast: expected one of bfloat16, float16"),
        ({"autocast": torch.bfloat16}, ArgumentError, "autocast: "),
        ({"evaluate_every": 0}, ArgumentError, "evaluate_every: "),
        ({"method": "magnitud"}, ArgumentError, "unknown method"),
        ({"pattern": "2:4"}, ArgumentError, "sparsity: expected None or 0.5 with pattern"),
        ({"pattern": "2:4", "sparsity": 0.5}, ArgumentError, "schedule: expected 'constant'"),
        ({"cycle": (0.6, 0.1, 0.3)}, ArgumentTypeError, "cycle: expected a CycleShares"),
        ({"resurrection": 1e-3}, ArgumentTypeError, "resurrection: expected a Resurrect"),
        ({"early_stop": EarlyStop("loss")}, ArgumentError, "evaluate_every: expected a number"),
        ({"early_stop": "loss"}, ArgumentTypeError, "early_stop: expected a EarlyStop"),
        ({"checkpoint": "folder"}, ArgumentTypeError, "checkpoint: expected a Checkpoint"),
        ({"stats": 3}, ArgumentTypeError, "stats: expected a path"),
        ({"compile": 1}, ArgumentTypeError, "compile: expected a bool"),
    ],
)
def test_bad_values_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CycleShares(train=-1), r"cycle\.train: "),
        (lambda: CycleShares(1, 0, 0), "stabilize or resu above 0"),
        (lambda: EarlyStop("loss", mode="less"), "mode: expected one of max, min"),
        (lambda: EarlyStop("loss", patience=0), "patience: expected an integer >= 1"),
        (lambda: CheckpointConfig("x", every=0), "every: "),
        (lambda: CheckpointConfig("x", keep=0), "keep: "),
    ],
)
def test_bad_parts_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
