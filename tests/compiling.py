"""Compile through GraphVariants without Inductor, and watch what it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.backends.debugging import aot_eager

from resu_compile import state
from resu_compile.config import CompileConfig
from resu_compile.runtime.variants import GraphVariants


class Backend:
    """A Dynamo backend that keeps its graphs in ``graphs``; the inner compiler is AOTAutograd."""

    def __init__(self, threshold: Any = 1.0, adopt: Any = None, inner: Any = aot_eager) -> None:
        self.config = CompileConfig(sparse_threshold=threshold)
        self.adopt = adopt
        self.inner = inner
        self.graphs: list[GraphVariants] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> GraphVariants:
        made = GraphVariants(gm, example_inputs, self.config, self.inner, self.adopt)
        self.graphs.append(made)
        return made

    @property
    def counts(self) -> list[int]:
        """Compiled variants of each graph."""
        return [graph.compile_count for graph in self.graphs]


@contextlib.contextmanager
def eager_masking(monkeypatch: Any) -> Iterator[list[torch.Size]]:
    """Shapes of the gradients that were masked outside of graphs."""
    masked: list[torch.Size] = []
    route_gradient = state.route_gradient

    def count(grad: torch.Tensor, *args: Any) -> torch.Tensor:
        masked.append(grad.shape)
        return route_gradient(grad, *args)

    with monkeypatch.context() as patch:
        patch.setattr(state, "route_gradient", count)
        yield masked


@contextlib.contextmanager
def no_recompile() -> Iterator[None]:
    """Raise if Dynamo captures anything again."""
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.compiler.set_stance("fail_on_recompile"),
    ):
        yield
