"""Which places were ever pruned, and how many of the active ones came back from there.

The counterpart of Rs, the share of the places that were ever active (``runtime/mask_history.py``):
a run that begins dense has Rs = 1 from the start, whoever comes back later.
"""

from __future__ import annotations

from torch import Tensor

from resu_compile.runtime.controller import Controller


class EverPruned:
    """The OR of all places that each weight has had pruned, as far as they were recorded."""

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}

    def record(self, controller: Controller) -> None:
        """Add what is pruned now; to be called after each pruning and commit."""
        for name, mask in controller.masks.items():
            before = self._places.get(name)
            self._places[name] = ~mask if before is None else before | ~mask

    def came_back(self, controller: Controller) -> float:
        """Share of the places active now that had been pruned before, in [0, 1]."""
        masks = controller.masks
        active = sum(int(mask.sum()) for mask in masks.values())
        back = sum(int((masks[name] & places).sum()) for name, places in self._places.items())
        return back / active if active else 0.0
