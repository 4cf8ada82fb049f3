"""Each example in its smallest form."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import resu_compile as resu
from resu_compile.experiments import ExperimentConfig, TaskSpec, run_experiment
from resu_compile.experiments.cells import build_cells
from resu_compile.experiments.records import read_records
from resu_compile.experiments.tasks import text
from resu_compile.methods import training_method_names
from resu_compile.training import TrainingConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_pruned(model, sparsity):
    control = resu.controller(model)
    assert control.sparsity == pytest.approx(sparsity, abs=0.02)
    for name, mask in control.masks.items():
        assert torch.count_nonzero(model.get_parameter(name)[~mask]) == 0
    return set(control.masks)


@pytest.mark.parametrize("name", ["resnet20", "gpt12", "finetune_hf"])
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 100


def test_resnet20(capsys):
    arguments = ["--steps", "12", "--width", "4", "--method", "rigl", "--eager"]
    names = assert_pruned(load("resnet20").main(arguments), 0.9)
    assert not {"conv.weight", "head.weight"} & names
    assert len(names) == 20  # 18 convolutions of 3 x 3, and two shortcuts
    accuracy = re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)
    assert 0.0 <= float(accuracy[1]) <= 100.0


def test_gpt12(capsys, monkeypatch):
    monkeypatch.setattr(text, "SIZES", dict(text.SIZES))
    model = load("gpt12").main(["--tiny", "--steps", "20", "--method", "gmp", "--eager"])
    assert len(assert_pruned(model, 0.8)) == 12 * 4
    printed = capsys.readouterr().out
    assert len(re.findall(r"^step ", printed, re.MULTILINE)) == 20
    bits = float(re.search(r": ([\d.]+) bits per byte", printed)[1])
    assert 2.0 < bits < 8.1  # 8 knows nothing


def test_finetune_hf(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    arguments = [str(tmp_path / "dense"), str(tmp_path / "text.txt"), "--eager", "--steps", "50"]
    arguments += ["--context", "16", "--batch", "2", "--lr", "0.003", "--method", "gmp"]
    arguments += ["--output", str(tmp_path / "sparse")]
    model = load("finetune_hf").main(arguments)
    names = assert_pruned(model, 0.5)
    assert len(names) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in names)
    losses = re.search(r"loss: ([\d.]+) dense before, ([\d.]+) at 50%", capsys.readouterr().out)
    assert float(losses[2]) < float(losses[1])
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name in names:
        assert torch.equal(written.get_parameter(name), model.get_parameter(name))


# -- configs -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("evidence_bytes", 2 * 5 * (1 + 14 * 4)),
        ("evidence_digits", 40 * (1 + 14 * 3)),
        ("experiment_small", 3 * (1 + 5 * 2)),
        ("ablations_bytes", 5 * (1 + 20 * 3)),
        ("ablations_digits", 10 * (1 + 20 * 3)),
        ("evidence_bytes_1x", 5 * (1 + 14 * 4)),
    ],
)
def test_configs(name, runs):
    pytest.importorskip("yaml")
    config = ExperimentConfig.load(EXAMPLES / f"{name}.yaml")
    cells = build_cells(config)
    assert sum(cell.kind == "run" for cell in cells) == runs
    trials = [cell for cell in cells if cell.kind == "trial"]
    for method in config.methods:
        for sparsity in config.sparsities if method.search else ():
            found = [c for c in trials if (c.method, c.sparsity) == (method, sparsity)]
            # a method with few settings has fewer trials than its budget
            assert 3 <= len(found) <= config.tuning.trials
            assert found[0].settings == {}
    searched = sum(bool(method.search) for method in config.methods)
    assert len(trials) >= 0.9 * len(config.sparsities) * searched * config.tuning.trials
    assert config.tuning.seed not in config.seeds


def test_evidence_has_all_methods():
    pytest.importorskip("yaml")
    for name in ("evidence_bytes", "evidence_bytes_1x", "evidence_digits"):
        config = ExperimentConfig.load(EXAMPLES / f"{name}.yaml")
        assert {m.name for m in config.methods} == {"dense", *training_method_names()}


def test_each_ablation_differs_from_resu(tmp_path):
    """Every entry of the file trains, here on a model that takes no time, and otherwise."""
    pytest.importorskip("yaml")
    config = ExperimentConfig.load(EXAMPLES / "ablations_bytes.yaml")
    task = TaskSpec("tests.experiments.linear_task:make", steps=200, options={"lr": 0.05})
    config = replace(
        config,
        tasks=(task,),
        sparsities=(0.75,),
        seeds=(0,),
        training={"compile": False},
        output=tmp_path,
    )
    assert run_experiment(config).failed == ()
    losses = {r["method"]: r["scores"]["test"]["loss"] for r in read_records(config.results)}
    assert len(losses) == 21
    assert len(set(losses.values())) == 21, losses


def test_the_ablations_change_the_default():
    """The first is the default, and each other one has the default's theta where it is silent."""
    pytest.importorskip("yaml")
    config = ExperimentConfig.load(EXAMPLES / "ablations_bytes.yaml")
    resus = [method for method in config.methods if method.name == "resu"]
    assert resus[0].training == {}
    whole = asdict(TrainingConfig().resurrection)
    for method in resus:
        if "resurrection" in method.training:
            found = asdict(TrainingConfig.from_dict(method.training).resurrection)
            changed = {name for name, value in found.items() if value != whole[name]}
            named = set(method.training["resurrection"])
            assert named <= changed <= named | {"rule"}  # which frozen weights decide
