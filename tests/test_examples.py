import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import resu_compile as resu
from resu_compile.runtime.controller import find_controller

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cartpole(monkeypatch):
    pytest.importorskip("gymnasium")
    return load_example("cartpole", monkeypatch)


def test_cartpole_ends_dense(cartpole, capsys):
    policy = cartpole.main(["--updates", "25", "--episodes", "2"])
    assert find_controller(policy) is None
    assert type(policy) is cartpole.Policy
    assert not policy._forward_pre_hooks
    # what came back last began at zero, and a sign may not have moved it yet
    assert all((weight != 0).float().mean() > 0.9 for weight in policy.parameters())
    rows = re.findall(r"^(\w+) +(\d+)% +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [(name, sparsity) for name, sparsity, _ in rows] == [
        ("untrained", "0"),
        ("0", "70"),
        ("1", "50"),
        ("2", "30"),
        ("3", "10"),
        ("4", "0"),
        ("end", "0"),
    ]
    assert all(1.0 <= float(mean) <= 500.0 for _, _, mean in rows)


def test_cartpole_learns_dense(cartpole):
    """The loss teaches: a policy that is trained stands longer than one that is not."""
    policy = cartpole.Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    before = cartpole.play(policy, episodes=8, seed=0).mean_return
    for update in range(15):
        played = cartpole.play(policy, episodes=8, seed=update)
        optimizer.zero_grad()
        cartpole.policy_loss(policy, played).backward()
        optimizer.step()
    assert cartpole.play(policy, episodes=8, seed=0).mean_return > 2 * before


def test_cartpole_returns(cartpole):
    running = torch.tensor([[True, True], [True, False], [True, False]])
    played = cartpole.Episodes(torch.zeros(3, 2, 4), torch.zeros(3, 2), running)
    expected = torch.tensor([[1 + 0.99 + 0.99**2, 1.0], [1.99, 0.0], [1.0, 0.0]]) / 100
    torch.testing.assert_close(played.returns(), expected)
    assert played.mean_return == 2.0


def test_digits(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    digits = load_example("digits", monkeypatch)
    model = digits.main(["--steps", "80", "--eager"])
    control = resu.controller(model)
    assert control.phase is resu.Phase.SPARSE
    masks = control.masks  # ranked over all layers
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == int((1 - 0.9) * total)
    for name, mask in masks.items():
        assert torch.count_nonzero(model.get_parameter(name)[~mask]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ *(\d+) +([\d.]+)% +(\d*) +([\d.]+)%$", printed, re.MULTILINE)
    assert [(int(step), float(pruned)) for step, pruned, _, _ in rows] == [
        (19, 72.2),  # a commit prunes for the next cycle as well
        (30, 85.1),
        (41, 89.5),
        (52, 90.0),
        (64, 90.0),
        (80, 90.0),
    ]
    assert sum(int(came_back) for _, _, came_back, _ in rows[:-1]) > 0
    assert float(rows[-1][-1]) > 50.0  # chance is 10
    program = resu.load(tmp_path / "digits.pt2")
    pixels = digits.load_images()[1].pixels[:1]
    torch.testing.assert_close(program(pixels), model(pixels), rtol=1e-4, atol=1e-4)
