import gc
import json
import logging
import os
import shutil
import signal
import time

import pytest
import torch

from resu_compile.errors import ArgumentError, ArgumentTypeError, ArtifactError
from resu_compile.training import checkpoint
from resu_compile.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def make_state(step, size=3):
    return {
        "step": step,
        "weight": torch.full((size,), float(step)),
        "state": {0: (torch.tensor(step), None)},
    }


def check_state(state, step):
    assert state["step"] == step
    assert (state["weight"] == step).all()
    assert state["state"][0][0].item() == step
    assert state["state"][0][1] is None


def steps_in(folder):
    return [load_checkpoint(path)["step"] for path in list_checkpoints(folder)]


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".tmp-")]


def test_saves_and_loads(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert list_checkpoints(folder) == []
    assert latest_checkpoint(folder) is None
    path = save_checkpoint(folder, make_state(7), step=7, keep=1)
    assert path == folder / "step-00000007" == latest_checkpoint(folder)
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "tensors.safetensors"]
    check_state(load_checkpoint(path), 7)
    check_state(load_checkpoint(str(folder)), 7)
    assert leftovers(folder) == []


def test_what_it_is_written_with(tmp_path):
    path = save_checkpoint(tmp_path, make_state(7), step=7, keep=1)
    document = json.loads((path / "state.json").read_text())
    assert document["format_version"] == 1
    assert document["step"] == 7
    assert document["torch_version"] == str(torch.__version__)
    assert document["package_version"]


def test_other_tools_read_the_tensors(tmp_path):
    from safetensors.torch import load_file

    path = save_checkpoint(tmp_path, make_state(7), step=7, keep=1)
    tensors = load_file(path / "tensors.safetensors")
    assert sorted(tensors) == ["state[0][0]", "weight"]
    assert torch.equal(tensors["weight"], torch.full((3,), 7.0))


def test_state_without_tensors(tmp_path):
    save_checkpoint(tmp_path, [1, "two"], step=0, keep=1)
    assert load_checkpoint(tmp_path) == [1, "two"]


def test_loaded_tensors_outlive_the_files(tmp_path):
    save_checkpoint(tmp_path, make_state(7, size=5000), step=7, keep=1)
    state = load_checkpoint(tmp_path)
    (path,) = list_checkpoints(tmp_path)
    (path / "tensors.safetensors").write_bytes(b"")
    shutil.rmtree(path)
    gc.collect()
    check_state(state, 7)
    state["weight"].add_(1)  # and can be written to


def test_device(tmp_path):
    save_checkpoint(tmp_path, make_state(7), step=7, keep=1)
    assert load_checkpoint(tmp_path, device="meta")["weight"].device.type == "meta"
    assert load_checkpoint(tmp_path)["weight"].device.type == "cpu"


# -- how many --------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keeps_the_newest(tmp_path, keep):
    for step in (3, 10, 200, 1000, 123456789):
        save_checkpoint(tmp_path, make_state(step), step=step, keep=keep)
    assert steps_in(tmp_path) == [3, 10, 200, 1000, 123456789][-keep:]
    assert leftovers(tmp_path) == []


def test_same_step_again_replaces(tmp_path):
    for value in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(value), step=5, keep=2)
    save_checkpoint(tmp_path, make_state(4), step=6, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000005-3",
        "step-00000006",
    ]
    assert steps_in(tmp_path) == [3, 4]


def test_later_steps_of_another_run_stay(tmp_path, caplog):
    save_checkpoint(tmp_path, make_state(90), step=90, keep=1)
    save_checkpoint(tmp_path, make_state(10), step=10, keep=1)
    save_checkpoint(tmp_path, make_state(20), step=20, keep=1)
    assert steps_in(tmp_path) == [20, 90]
    assert "later steps" in caplog.text


def test_other_files_stay(tmp_path):
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "step-00000001.txt").write_text("mine")
    for step in range(3):
        save_checkpoint(tmp_path, make_state(step), step=step, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001.txt",
        "step-00000002",
        "step-notes.txt",
    ]


def test_what_cannot_be_removed_is_only_logged(tmp_path, monkeypatch, caplog):
    save_checkpoint(tmp_path, make_state(1), step=1, keep=1)

    def refuse(path, **_):
        raise PermissionError(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save_checkpoint(tmp_path, make_state(2), step=2, keep=1)
    assert "could not be removed" in caplog.text
    assert steps_in(tmp_path) == [2]
    monkeypatch.undo()
    save_checkpoint(tmp_path, make_state(3), step=3, keep=1)
    assert leftovers(tmp_path) == []


# -- damage ----------------------------------------------------------------------------------
def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(**changes):
    def write(path):
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | changes))

    return write


DAMAGES = [
    pytest.param("tensors.safetensors", truncate, "sha256", id="tensors truncated"),
    pytest.param("tensors.safetensors", flip_last_bit, "sha256", id="tensors flipped"),
    pytest.param("tensors.safetensors", os.remove, "can be read", id="tensors missing"),
    pytest.param("state.json", truncate, "JSON", id="state truncated"),
    pytest.param("state.json", lambda p: p.write_bytes(b"\xff\xfe{"), "JSON", id="state binary"),
    pytest.param("state.json", lambda p: p.write_text("[]"), "format", id="state other"),
    pytest.param("state.json", os.remove, "can be read", id="state missing"),
    pytest.param("state.json", edit(format="x"), "format", id="other format"),
    pytest.param("state.json", edit(tree={"dict": {}}), "checksum", id="tree changed"),
    pytest.param("state.json", edit(format_version=2), "that release", id="other version"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_one_is_named_and_passed_over(tmp_path, caplog, name, damage, message):
    save_checkpoint(tmp_path, make_state(1), step=1, keep=3)
    path = save_checkpoint(tmp_path, make_state(2), step=2, keep=3)
    damage(path / name)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_checkpoint(path)
    assert str(path / name) in str(caught.value)
    with caplog.at_level(logging.WARNING):
        check_state(load_checkpoint(tmp_path), 1)
    assert str(path / name) in caplog.text
    save_checkpoint(tmp_path, make_state(2), step=2, keep=3)
    check_state(load_checkpoint(tmp_path), 2)


def test_missing_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_checkpoint(tmp_path, make_state(1), step=1, keep=1)
    tensors = load_file(path / "tensors.safetensors")
    del tensors["weight"]
    save_file(tensors, path / "tensors.safetensors")
    digest = checkpoint.hashlib.sha256((path / "tensors.safetensors").read_bytes()).hexdigest()
    edit(tensors_sha256=digest)(path / "state.json")
    with pytest.raises(ArtifactError, match=r"state\.json: .*'weight'.*damaged"):
        load_checkpoint(path)


def test_no_tensors_file_behind_a_right_checksum(tmp_path):
    path = save_checkpoint(tmp_path, make_state(1), step=1, keep=1)
    (path / "tensors.safetensors").write_bytes(b"text")
    digest = checkpoint.hashlib.sha256(b"text").hexdigest()
    edit(tensors_sha256=digest)(path / "state.json")
    with pytest.raises(ArtifactError, match="expected a safetensors file"):
        load_checkpoint(path)


def test_all_damaged(tmp_path):
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, make_state(step), step=step, keep=3) / "state.json")
    with pytest.raises(ArtifactError, match="step-00000001"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["", "nowhere", "step-00000003"])
def test_nothing_to_load(tmp_path, name):
    with pytest.raises(ArtifactError, match=r"expected a .*, got|can be read"):
        load_checkpoint(tmp_path / name)


# -- arguments -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"step": -1}, ArgumentError),
        ({"step": 1.0}, ArgumentTypeError),
        ({"step": True}, ArgumentTypeError),
        ({"keep": 0}, ArgumentError),
        ({"keep": None}, ArgumentTypeError),
    ],
)
def test_bad_numbers(tmp_path, changes, error):
    (name,) = changes
    with pytest.raises(error, match=f"^{name}: expected an integer >= "):
        save_checkpoint(tmp_path, {}, **({"step": 0, "keep": 1} | changes))


def test_bad_state_touches_nothing(tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"^model\.x: expected"):
        save_checkpoint(tmp_path / "run", {"model": {"x": {1, 2}}}, step=0, keep=1)
    assert not (tmp_path / "run").exists()


def test_without_safetensors(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(checkpoint, "import_module", missing)
    with pytest.raises(ArgumentError, match=r"pip install resu-compile\[train\]"):
        save_checkpoint(tmp_path, {}, step=0, keep=1)
    assert list(tmp_path.iterdir()) == []


# -- faults and kills ------------------------------------------------------------------------
class FailAt:
    """A function of ``os`` that raises at its n-th call."""

    def __init__(self, monkeypatch, name, n):
        self.calls, self.n, self.original = 0, n, getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.n:
            raise OSError(28, "No space left on device")
        return self.original(*args, **kwargs)


def count_calls(tmp_path, monkeypatch, name):
    counter = FailAt(monkeypatch, name, -1)
    for step in (1, 2):
        counter.calls = 0
        save_checkpoint(tmp_path / "count", make_state(step), step=step, keep=1)
    monkeypatch.undo()
    return counter.calls


@pytest.mark.parametrize("name", ["replace", "fsync", "mkdir", "open"])
def test_failure_at_any_call(tmp_path, monkeypatch, name):
    calls = count_calls(tmp_path, monkeypatch, name)
    assert calls == {"replace": 2, "fsync": 4}.get(name, calls) > 0
    for n in range(1, calls + 1):
        folder = tmp_path / f"{n}"
        save_checkpoint(folder, make_state(1), step=1, keep=1)
        FailAt(monkeypatch, name, n)
        try:
            save_checkpoint(folder, make_state(2), step=2, keep=1)
            saved = True
        except OSError as error:
            assert "No space" in str(error)  # noqa: PT017  (it may also not be raised)
            saved = False
        monkeypatch.undo()
        newest = 2 if list_checkpoints(folder)[-1].name == "step-00000002" else 1
        assert newest == 2 or not saved
        check_state(load_checkpoint(folder), newest)
        save_checkpoint(folder, make_state(3), step=3, keep=1)
        assert steps_in(folder) == [3]
        assert leftovers(folder) == []


def test_disk_refuses_the_tensors(tmp_path, monkeypatch):
    import safetensors.torch

    save_checkpoint(tmp_path, make_state(1), step=1, keep=1)

    def refuse(*_):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    with pytest.raises(OSError, match=r"tensors\.safetensors: could not be written"):
        save_checkpoint(tmp_path, make_state(2), step=2, keep=1)
    assert steps_in(tmp_path) == [1]
    assert leftovers(tmp_path) == []


class Killed(BaseException):
    """Stands for a kill: nothing after it runs, not even the tidying up."""


def test_kill_at_any_call(tmp_path, monkeypatch):
    """Everything that touches the disk, cut off there; tidying up included."""
    names = [(os, "replace"), (os, "fsync"), (os, "open"), (shutil, "rmtree"), (os, "unlink")]

    def save_with_kill(folder, n):
        calls = 0

        def guard(original):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if n is not None and calls >= n:
                    raise Killed
                return original(*args, **kwargs)

            return call

        for module, name in names:
            monkeypatch.setattr(module, name, guard(getattr(module, name)))
        try:
            save_checkpoint(folder, make_state(2), step=2, keep=1)
        except Killed:
            pass
        finally:
            monkeypatch.undo()
        return calls

    save_checkpoint(tmp_path / "count", make_state(1), step=1, keep=1)
    calls = save_with_kill(tmp_path / "count", None)
    assert calls >= 8
    found = set()
    for n in range(1, calls + 1):
        folder = tmp_path / f"{n}"
        save_checkpoint(folder, make_state(1), step=1, keep=1)
        save_with_kill(folder, n)
        state = load_checkpoint(folder)
        found.add(state["step"])
        check_state(state, state["step"])
        assert steps_in(folder)[-1] == state["step"]  # each that is listed can be read
        save_checkpoint(folder, make_state(3), step=3, keep=1)
        assert steps_in(folder) == [3]
        assert leftovers(folder) == []
    assert found == {1, 2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    """A process that saves all the time is killed 20 times; the newest is whole each time.

    30 000 numbers are few enough for one thread: a fork takes no others along.
    """
    generator = torch.Generator().manual_seed(0)
    last = 0
    newest = save_checkpoint(tmp_path, make_state(0, 30_000), step=0, keep=2)
    for _ in range(20):
        child = os.fork()
        if child == 0:  # pragma: no cover
            step = last
            try:
                while True:
                    step += 1
                    save_checkpoint(tmp_path, make_state(step, 30_000), step=step, keep=2)
            finally:
                os._exit(1)  # an error must not run on as a second pytest
        deadline = time.monotonic() + 60.0
        while latest_checkpoint(tmp_path) == newest and time.monotonic() < deadline:
            time.sleep(0.001)  # however slow the disk is, each child gets to save
        time.sleep(0.03 * torch.rand((), generator=generator).item())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = latest_checkpoint(tmp_path)
        state = load_checkpoint(newest)  # this very one, not one before it
        check_state(state, state["step"])
        assert state["step"] > last
        last = state["step"]
    save_checkpoint(tmp_path, make_state(last + 1), step=last + 1, keep=2)
    assert leftovers(tmp_path) == []
    assert steps_in(tmp_path) == [last, last + 1]
