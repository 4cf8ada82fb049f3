"""Blocks that follow one another are run on stored inputs instead of through the whole model.

    model(x)    block 0 gets (h0, *rest), block 1 gets (h1, *rest), ...     h1 is what block 0 gave
    replay      h0 and rest are stored;  h1 = block 0(h0, *rest);  h2 = block 1(h1, *rest);  ...

A first run of one batch finds out whether the model is like that: every block is called once and in
order, each with the same arguments but for those that are outputs of the block before, and the
blocks one after the other on their own give the same output to the bit. If not (arguments made anew
for each block, sums between blocks, keys and values that blocks share), there is no replay. A cache
that blocks only leave things in is copied as the first block got it, and each block gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from resu_compile.calibration.data import Batches, is_constant, kept_leaf, run_batch

T = TypeVar("T")
Look = Callable[[tuple[Any, ...], dict[str, Any]], None]
Links = dict[int, int]  # leaf of a block's inputs -> leaf of the outputs of the block before


class _Stop(BaseException):
    """Ends a forward pass at the first block; no code of a model catches it."""


class Replay:
    """Stored inputs of one block after the other.

    Args:
        modules: the blocks, in order.
        model: the root.
        data: the batches.
        chain: what ``find_chain`` gave.
    """

    def __init__(
        self, modules: Sequence[nn.Module], model: nn.Module, data: Batches, chain: Chain
    ) -> None:
        self._module = modules[0]
        self._chain = chain
        self._inputs: list[tuple[list[Any], TreeSpec]] = []
        with _inputs_of(modules[0], self._store):
            for batch in data.batches:
                try:
                    run_batch(model, batch)
                except _Stop:
                    continue

    def _store(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        self._inputs.append(([kept_leaf(leaf) for leaf in leaves], spec))
        raise _Stop

    @property
    def fits(self) -> bool:
        """Whether all batches came to the first block in the form that the first batch had."""
        return all(spec == self._chain.spec for _, spec in self._inputs)

    def run(self) -> None:
        """The present block on all stored inputs."""
        for leaves, spec in self._inputs:
            _call(self._module, leaves, spec)

    def advance(self, module: nn.Module) -> None:
        """Run the present block once more; its outputs become the inputs of ``module``."""
        for leaves, spec in self._inputs:
            outputs = tree_leaves(_call(self._module, leaves, spec))
            for position, source in self._chain.links.items():
                leaves[position] = outputs[source].detach()
        self._module = module


@dataclass(frozen=True)
class Chain:
    """How the inputs of a block come from the block before, and their form."""

    links: Links
    spec: TreeSpec


def find_chain(modules: Sequence[nn.Module], model: nn.Module, batch: Any) -> Chain | None:
    """How outputs of a block become inputs of the next, or None if replay would differ.

    Args:
        modules: the blocks, in order, at least two.
        model: the root.
        batch: one batch of data, which is run through the model once.
    """
    trial = _Trial(modules)
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(_inputs_of(module, trial.before(index)))
            handle = module.register_forward_hook(trial.after(index))
            stack.callback(handle.remove)
        run_batch(model, batch)
    return trial.chain()


class _Trial:
    """What one forward pass showed; it holds the tensors of one block at a time."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self.links: Links | None = None
        self._fits = True
        self._seen = 0
        self._inputs: list[Any] = []
        self._spec: TreeSpec | None = None
        self._outputs: list[Any] = []
        self._first: tuple[list[Any], TreeSpec] | None = None
        self._last_outputs: list[Any] = []
        self._versions: dict[int, int] = {}

    def before(self, index: int) -> Look:
        """Looks at the inputs of block ``index``."""

        def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves, spec = tree_flatten((args, kwargs))
            if index != self._seen or any(map(_is_untracked, leaves)):
                self._fits = False
                return
            if index == 0:
                self._first = _attempt(lambda: ([kept_leaf(leaf) for leaf in leaves], spec))
            elif spec != self._spec:
                self._fits = False
            else:
                links = _links(self._inputs, self._outputs, leaves, self._versions)
                self._fits &= bool(links) and self.links in (None, links)
                self.links = links
            self._inputs, self._spec = leaves, spec
            self._note(leaves)

        return look

    def after(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Looks at the outputs of block ``index``."""

        def look(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._seen += 1
            self._outputs = tree_leaves(output)
            self._note(self._outputs)
            if index == len(self._modules) - 1:
                self._last_outputs = [kept_leaf(leaf) for leaf in self._outputs]

        return look

    def _note(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not leaf.is_inference():
                self._versions[id(leaf)] = leaf._version

    def chain(self) -> Chain | None:
        """The chain, if all blocks ran once, in order, linked alike, and give the same alone."""
        if not self._fits or self._seen != len(self._modules) or not self.links or not self._first:
            return None
        leaves, spec = self._first
        outputs: list[Any] = []
        for module in self._modules:
            found = _attempt(partial(_call, module, leaves, spec))
            if found is None:
                return None
            outputs = tree_leaves(found)
            for position, source in self.links.items():
                leaves[position] = outputs[source]
        sources = set(self.links.values())
        same = all(torch.equal(outputs[i], self._last_outputs[i]) for i in sources)
        return Chain(self.links, spec) if same else None


def _attempt(run: Callable[[], T]) -> T | None:
    """What ``run`` gives, or None if a block, or the copy of an argument, does not work alone."""
    try:
        return run()
    except Exception:  # noqa: BLE001  # whatever it is, the whole model shows it if it is an error
        return None


def _links(
    before: list[Any], outputs: list[Any], leaves: list[Any], versions: dict[int, int]
) -> Links | None:
    """Leaves that are outputs of the block before; None if others differ from its inputs.

    Args:
        before: leaves of the inputs of the block before.
        outputs: leaves of its outputs.
        leaves: leaves of the inputs of this block.
        versions: id -> version at which a tensor was seen; another one was written into since.
    """
    links: Links = {}
    for position, (old, leaf) in enumerate(zip(before, leaves, strict=True)):
        if not isinstance(leaf, Tensor):
            same = type(leaf) is type(old) and leaf == old if is_constant(leaf) else leaf is old
            if not same:
                return None
            continue
        if leaf._version != versions.get(id(leaf)):
            return None
        source = next((i for i, out in enumerate(outputs) if out is leaf), None)
        if source is not None:
            links[position] = source
        elif leaf is not old:
            return None
    return links


def _is_untracked(leaf: Any) -> bool:
    """True for a tensor without a version that tells of writes."""
    return isinstance(leaf, Tensor) and leaf.is_inference()


def _call(module: nn.Module, leaves: list[Any], spec: TreeSpec) -> Any:
    args, kwargs = tree_unflatten([kept_leaf(leaf) for leaf in leaves], spec)
    return module(*args, **kwargs)


@contextmanager
def _inputs_of(module: nn.Module, look: Look) -> Iterator[None]:
    """``look(args, kwargs)`` before each forward of ``module``."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(args, kwargs)

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
