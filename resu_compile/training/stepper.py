"""One optimizer step of a training loop: batches, mixed precision, clipping, learning rate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from resu_compile.training.batches import BatchStream
from resu_compile.training.config import TrainingConfig
from resu_compile.training.distributed import check_gradients, data_parallel_of
from resu_compile.training.losses import LossWatch

if TYPE_CHECKING:
    from resu_compile.training.cycle import Cycle
    from resu_compile.training.sparse_training import SparseTraining

LossFn = Callable[[nn.Module, Any], Tensor]


class Stepper:
    """Makes optimizer steps.

    Args:
        model: on its device; a ``DistributedDataParallel`` averages gradients over the ranks once
            a step, after the last batch.
        optimizer: of the model's parameters.
        loss_fn: ``(model, batch) -> scalar tensor``.
        config: ``accumulate``, ``autocast`` and ``clip_norm`` are used.
        scheduler: stepped after each optimizer step.

    Attributes:
        scaler: scales the loss with ``autocast="float16"``; does nothing otherwise.
        watch: over the losses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        config: TrainingConfig,
        scheduler: LRScheduler | None,
    ) -> None:
        self._model = model
        self._parallel = data_parallel_of(model)
        self._checked = False
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._config = config
        self._scheduler = scheduler
        self._device_type = next(model.parameters()).device.type
        self.watch = LossWatch()
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=config.autocast == "float16")

    def step(self, batches: BatchStream, number: int, run: SparseTraining | Cycle) -> Tensor:
        """One optimizer step.

        Args:
            batches: where ``config.accumulate`` of them are taken from.
            number: of the step, counted from 1, for messages.
            run: looks at the gradients before they are clipped, and may take the step's place.

        Returns:
            The mean loss of the batches, shape (), detached.

        Raises:
            ArgumentError: the loss is no scalar, or not finite.
        """
        config, scaler = self._config, self.scaler
        total: Tensor | None = None
        for index in range(config.accumulate):
            batch = batches.next()
            with self._gradients_stay(index < config.accumulate - 1):
                with self.autocast():
                    loss = self._loss_fn(self._model, batch)
                self.watch.see(loss, number)
                share = loss / config.accumulate if config.accumulate > 1 else loss
                scaler.scale(share).backward()
            found = share.detach().reshape(())
            total = found if total is None else total + found
        if not self._checked:
            check_gradients(self._model.parameters(), number)
            self._checked = True
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        goes_on = run.after_backward(loss_scale=scale)
        if goes_on or not scaler.is_enabled():  # without gradients a step changes nothing
            if config.clip_norm is not None:
                scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._model.parameters(), config.clip_norm)
            scaler.step(self._optimizer)
            scaler.update()
        if self._scheduler is not None:
            self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        assert total is not None
        return total

    def _gradients_stay(self, here: bool) -> AbstractContextManager[None]:
        """The context in which gradients are not averaged yet, if ``here``."""
        found: AbstractContextManager[None] = nullcontext()
        if here and self._parallel is not None:
            found = self._parallel.no_sync()
        return found

    def autocast(self) -> torch.autocast:
        """The context of mixed precision; does nothing without ``config.autocast``."""
        dtype = torch.float16 if self._config.autocast == "float16" else torch.bfloat16
        return torch.autocast(self._device_type, dtype, enabled=self._config.autocast is not None)
