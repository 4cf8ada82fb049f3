"""The stream of batches: epochs, and the way back to a position."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.training.batches import BatchStream
from resu_compile.training.random_state import random_state, restore_random_state


def take(stream: BatchStream, count: int) -> list[object]:
    return [stream.next() for _ in range(count)]


def plain(batches: list[object]) -> list[object]:
    return [b.tolist() if isinstance(b, torch.Tensor) else b for b in batches]


def test_epochs_follow_each_other():
    stream = BatchStream([1, 2, 3])
    assert take(stream, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert (stream.epoch, stream.batches_in_epoch) == (2, 1)


def test_a_function_gives_the_batches_of_an_epoch():
    stream = BatchStream(lambda epoch: (10 * epoch + i for i in range(2 + epoch)))
    assert take(stream, 6) == [0, 1, 10, 11, 12, 20]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (iter([1]), ArgumentTypeError, "can be iterated again for the next epoch, got a list_iter"),
        ((i for i in [1]), ArgumentTypeError, "a generator, which runs out"),
        (3, ArgumentTypeError, "got a int"),
        ([], ArgumentError, "at least one batch, epoch 0 has none"),
        (lambda epoch: [1] * (1 - epoch), ArgumentError, "epoch 1 has none"),
    ],
)
def test_sources_that_do_not_do_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        take(BatchStream(source), 2)


class Noisy(torch.utils.data.Dataset):
    """Draws from every global generator, as augmentations do."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, float(torch.rand(())), random.random()])


def shuffled() -> DataLoader:
    return DataLoader(Noisy(), batch_size=3, shuffle=True)


def with_generator() -> DataLoader:
    return DataLoader(range(10), batch_size=3, shuffle=True, generator=torch.Generator())


SOURCES = {
    "list": lambda: list(range(4)),
    "function": lambda: lambda epoch: [(epoch, i) for i in range(4)],
    "shuffled": shuffled,
    "own generator": with_generator,
}


@pytest.mark.parametrize("used", [0, 1, 3, 4, 6, 9])
@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_the_way_back_gives_the_same_batches(make, used):
    torch.manual_seed(3)
    random.seed(3)
    source = make()
    stream = BatchStream(source)
    take(stream, used)
    torch.rand(5)  # the model draws too
    if isinstance(getattr(source, "generator", None), torch.Generator):
        torch.rand(5, generator=source.generator)
    state, rng = stream.state_dict(), random_state()
    expected = plain(take(stream, 12))

    torch.manual_seed(4)
    random.seed(4)
    again = BatchStream(make())
    before = torch.get_rng_state()
    again.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    restore_random_state(rng)
    assert plain(take(again, 12)) == expected
    assert again.epoch == stream.epoch


class Positioned:
    """A loader that keeps its own position."""

    def __init__(self):
        self.position = 0
        self.started = 0

    def __iter__(self):
        self.started += 1
        while self.position < 5:
            self.position += 1
            yield self.position
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_loader_that_keeps_its_position_is_asked_for_it():
    stream = BatchStream(Positioned())
    take(stream, 8)
    state = stream.state_dict()
    source = Positioned()
    again = BatchStream(source)
    again.load_state_dict(state)
    assert (again.epoch, again.batches_in_epoch) == (1, 3)
    assert take(again, 4) == [4, 5, 1, 2]
    assert source.started == 2  # nothing was read only to be dropped


def test_a_shorter_epoch_is_refused():
    stream = BatchStream([1, 2, 3])
    take(stream, 3)
    with pytest.raises(ArgumentError, match="at least 3 batches in epoch 0.* got 2"):
        BatchStream([1, 2]).load_state_dict(stream.state_dict())


def test_all_generators_are_restored():
    import numpy as np

    state = random_state()
    first = (torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand())
    restore_random_state(state)
    assert first == (
        torch.rand(2).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
    )


def test_numpy_is_left_alone_where_it_is_not_in_use(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy", raising=False)
    state = random_state()
    assert state["numpy"] is None
    assert "numpy" not in sys.modules
    restore_random_state(state)
    assert "numpy" not in sys.modules
