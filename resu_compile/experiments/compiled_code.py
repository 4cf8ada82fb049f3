"""Compiled code that cells have in common.

The graphs of a model serve all models of its class and shapes: what the first cell of a task
compiled is used by the next ones. Where models of a task do not share theirs, each cell compiles
anew from an empty cache, because Dynamo gives up on code that it has compiled too often.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.utils import counters


class CompiledCode:
    """Decides before each cell whether what is compiled stays."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._shared = True

    @contextmanager
    def of(self, key: Hashable) -> Iterator[None]:
        """The context in which a cell runs.

        Args:
            key: equal for cells whose models have the same class and shapes.
        """
        stays = key == self._key and self._shared
        if not stays:
            torch.compiler.reset()
        if key != self._key:
            self._key, self._shared = key, True
        before = counters["stats"]["unique_graphs"]
        yield
        if stays and counters["stats"]["unique_graphs"] > before:
            self._shared = False  # its model was captured all the same
