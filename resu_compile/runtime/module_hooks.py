"""The two hooks on the model itself: weights are right before a forward, masks unchanged after it.

They hold the controller, so that a copied or unpickled model brings its masks along: the copy's
controller is built from its snapshot on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resu_compile.errors import MaskChangedError

if TYPE_CHECKING:
    from resu_compile.runtime.controller import Controller


class ControllerSlot:
    """Holds the controller of one model; copies and pickles as a snapshot of its state."""

    def __init__(self, controller: Controller) -> None:
        self._controller: Controller | None = controller
        self._pending: dict[str, Any] | None = None
        self._root: nn.Module | None = None

    @property
    def controller(self) -> Controller:
        """The controller; in a copied model it is rebuilt from the snapshot now."""
        if self._controller is None:
            from resu_compile.runtime.controller import Controller

            assert self._root is not None
            assert self._pending is not None
            root, self._root = self._root, None
            pending, self._pending = self._pending, None
            self._controller = Controller.from_snapshot(root, pending, self)
        return self._controller

    def __getstate__(self) -> dict[str, Any]:
        if self._controller is None:
            return {"root": self._root, "snapshot": self._pending}
        return {"root": self._controller.model, "snapshot": self._controller.snapshot()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._controller = None
        self._root = state["root"]
        self._pending = state["snapshot"]


class BeforeForward:
    """Forward pre-hook: pruned places are 0 in the SPARSE phase, whoever wrote the weights."""

    def __init__(self, slot: ControllerSlot) -> None:
        self.slot = slot

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Refresh the weights."""
        if torch.compiler.is_compiling():
            return
        self.slot.controller.refresh()


class AfterForward:
    """Forward hook: a backward pass through another mask or phase raises."""

    def __init__(self, slot: ControllerSlot) -> None:
        self.slot = slot

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Put the check on every node that an output came from."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        check = unchanged_check(self.slot.controller)
        seen: set[int] = set()
        for tensor in _tensors(output):
            node = tensor.grad_fn
            if node is not None and id(node) not in seen:
                seen.add(id(node))
                node.register_prehook(check)


def unchanged_check(controller: Controller) -> Callable[[Any], None]:
    """A backward pre-hook that raises if masks or phase are not those of this moment any more."""
    epoch = controller.epoch

    def check(_grads: Any) -> None:
        if controller.epoch != epoch:
            raise MaskChangedError(
                "backward: expected the masks and the phase of the forward pass, but they "
                "changed in between (prune, commit, set_phase or load_state_dict); change "
                "masks only between optimizer steps and run the forward pass again"
            )

    return check


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for entry in fields(output):
            yield from _tensors(getattr(output, entry.name))
