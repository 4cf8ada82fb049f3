"""The state of a model while it is calibrated, and its way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.kernels.mask_bits import pack_mask, unpack_mask


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, nothing compiled, no fused layers; all of it restored.

    The fused attention and recurrent layers of torch would take their products out of sight of the
    observer.
    """
    training = [module for module in model.modules() if module.training]
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(_set_training, training)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.callback(_enable, backend, backend.enabled)
                _enable(backend, False)
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _enable(backend: Any, value: object) -> None:
    backend.enabled = value


def _set_training(modules: list[nn.Module]) -> None:
    for module in modules:
        module.training = True


class Journal:
    """What was written over weights during a calibration, to put back if it fails."""

    def __init__(self) -> None:
        self._removed: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # values at packed places

    def save(self, parameter: nn.Parameter) -> None:
        """Keep all values of ``parameter``, before they are trained."""
        places = pack_mask(torch.ones_like(parameter, dtype=torch.bool))
        self._removed.append((parameter, places, parameter.detach().clone().flatten()))

    def prune(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Zero ``parameter`` outside of ``mask``; what was there is kept."""
        pruned = ~mask.to(parameter.device)
        with torch.no_grad():
            self._removed.append((parameter, pack_mask(pruned), parameter.detach()[pruned]))
            parameter.masked_fill_(pruned, 0.0)

    def restore(self) -> None:
        """Undo everything, the last first."""
        with torch.no_grad():
            for parameter, places, values in reversed(self._removed):
                parameter.masked_scatter_(unpack_mask(places, parameter.shape), values)
        self._removed.clear()
