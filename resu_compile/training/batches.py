"""An endless stream of batches that knows where it is, and can go back there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.training.random_state import random_state, restore_random_state

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


class BatchStream:
    """Batches of one epoch after another.

    A position is found again by making the epoch anew, from the random states of its beginning,
    and passing over the batches that were used. A loader that keeps its own position
    (``state_dict`` and ``load_state_dict``) is asked for it instead. A loader or sampler with
    ``set_epoch`` is told of each epoch.

    Args:
        source: a ``DataLoader`` or anything that can be iterated again and again, or a function
            from the epoch, counted from 0, to the batches of that epoch.

    Attributes:
        epoch: the present epoch, from 0 on.
        batches_in_epoch: how many batches of it were used.
    """

    def __init__(self, source: Batches) -> None:
        if isinstance(source, Iterator):
            raise ArgumentTypeError(
                f"batches: expected something that can be iterated again for the next epoch, got "
                f"a {type(source).__name__}, which runs out; pass the list or the DataLoader "
                "itself, or a function (epoch) -> iterable"
            )
        if not isinstance(source, Iterable) and not callable(source):
            raise ArgumentTypeError(
                f"batches: expected a DataLoader, another iterable or a function (epoch) -> "
                f"iterable, got a {type(source).__name__}"
            )
        self.epoch = 0
        self.batches_in_epoch = 0
        self._source = source
        self._iterator: Iterator[Any] | None = None
        self._epoch_random: dict[str, Any] | None = None
        self._epoch_generators: list[torch.Tensor] = []

    def next(self) -> Any:
        """The next batch; the next epoch begins by itself.

        Raises:
            ArgumentError: an epoch without any batch.
        """
        if self._iterator is None:
            self._begin_epoch()
        try:
            batch = next(self._open())
        except StopIteration:
            if self.batches_in_epoch == 0:
                raise ArgumentError(
                    f"batches: expected at least one batch, epoch {self.epoch} has none"
                ) from None
            self.epoch += 1
            self.batches_in_epoch = 0
            self._begin_epoch()
            return self.next()
        self.batches_in_epoch += 1
        return batch

    def _open(self) -> Iterator[Any]:
        assert self._iterator is not None
        return self._iterator

    def _begin_epoch(self) -> None:
        self._epoch_random = random_state()
        self._epoch_generators = [found.get_state() for found in self._generators()]
        self._iterator = self._iterate()

    def _iterate(self) -> Iterator[Any]:
        source = self._source
        places = (source, getattr(source, "sampler", None), getattr(source, "batch_sampler", None))
        for place in places:
            set_epoch = getattr(place, "set_epoch", None)
            if set_epoch is not None:  # a DistributedSampler shuffles by it
                set_epoch(self.epoch)
        return iter(source if isinstance(source, Iterable) else source(self.epoch))

    def _generators(self) -> list[torch.Generator]:
        """The generators of its own that a loader and its sampler draw from."""
        places = [self._source, getattr(self._source, "sampler", None)]
        found: list[torch.Generator] = []
        for place in places:
            generator = getattr(place, "generator", None)
            if isinstance(generator, torch.Generator) and all(g is not generator for g in found):
                found.append(generator)
        return found

    def _keeps_position(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain data and tensors."""
        return {
            "epoch": self.epoch,
            "batches_in_epoch": self.batches_in_epoch,
            "epoch_random": self._epoch_random,
            "epoch_generators": self._epoch_generators,
            "generators": [found.get_state() for found in self._generators()],
            "loader": self._source.state_dict() if self._keeps_position() else None,  # type: ignore[union-attr]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of ``state``. The global random states are afterwards as before.

        Raises:
            ArgumentError: the epoch has fewer batches than were used of it.
        """
        self.epoch = state["epoch"]
        self.batches_in_epoch = state["batches_in_epoch"]
        self._epoch_random = state["epoch_random"]
        self._epoch_generators = list(state["epoch_generators"])
        self._iterator = None
        if self._epoch_random is None:  # nothing was read yet
            _set_states(self._generators(), state["generators"])
            return
        before = random_state()
        try:
            if self._keeps_position() and state["loader"] is not None:
                self._source.load_state_dict(state["loader"])  # type: ignore[union-attr]
                self._iterator = self._iterate()
            else:
                self._pass_over()
        finally:
            restore_random_state(before)
        _set_states(self._generators(), state["generators"])

    def _pass_over(self) -> None:
        assert self._epoch_random is not None
        restore_random_state(self._epoch_random)
        _set_states(self._generators(), self._epoch_generators)
        self._iterator = self._iterate()
        for index in range(self.batches_in_epoch):
            try:
                next(self._iterator)
            except StopIteration:
                raise ArgumentError(
                    f"batches: expected at least {self.batches_in_epoch} batches in epoch "
                    f"{self.epoch}, as when the checkpoint was written, got {index}"
                ) from None


def _set_states(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state.cpu())
