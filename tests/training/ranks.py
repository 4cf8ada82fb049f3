"""What two ranks do for tests/training/test_distributed.py, each run giving plain data."""

from __future__ import annotations

import gc
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import resu_compile as resu
from resu_compile.config import ResurrectionConfig
from resu_compile.errors import ResuCompileError
from resu_compile.training import (
    Callback,
    CheckpointConfig,
    Cycle,
    CycleShares,
    EarlyStop,
    SparseTraining,
    Trainer,
    TrainingConfig,
    TrainingResult,
    checkpoint,
)
from resu_compile.training.config import RESU_ONLY, TRIAL
from resu_compile.training.distributed import sync_masks
from tests.training.models import adamw, config, loss_fn, make_batches, make_model

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
STEPS_OF_SAVED = 12  # in a RESU span
PLACES = {
    "method": "saliency",
    "resurrection": ResurrectionConfig(places=0.4, score="saliency"),
}

HIDDEN = {  # what the default has, with enough of a budget for so small a model
    "method": "saliency",
    "cycles": 6,
    "cycle": CycleShares(**RESU_ONLY),
    "schedule": "auto",
    "resurrection": ResurrectionConfig(**TRIAL),
    "budget_start": 0.5,
    "budget_end": 0.1,
}


def main(rank: int, port: int, folder: str) -> None:
    """Every run, one after another; what they gave goes to ``folder/<rank>.pt``."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)  # a rank that hangs fails
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=wait)
    root = Path(folder)
    found = {
        "wrapped": averaged(rank, give_wrapper=True),
        "closure": averaged(rank, give_wrapper=False),
        "places": averaged(rank, give_wrapper=True, **PLACES),
        "hidden": averaged(rank, give_wrapper=True, **HIDDEN),
        "resumed": resumed(rank, root),
        "wanda": calibrated(rank, method="wanda"),
        "wanda++": calibrated(rank, method="wanda++"),
        "score": calibrated(rank, resurrection=ResurrectionConfig(score="wanda", init="normal")),
        "found": sparsified_before(rank),
        "own loop": own_loop(rank),
        **{name: by_method(rank, name) for name in ("set", "rigl", "snfs", "sr_ste")},
        "early stop": early_stop(rank),
        "errors": errors(rank, root),
        "example": example(root),
    }
    torch.save(found, root / f"{rank}.pt")
    gc.collect()  # gloo may hang if the group goes before what uses it
    dist.destroy_process_group()


def weights_and_masks(model: nn.Module, controller=None) -> dict[str, object]:
    controller = controller or resu.controller(model)
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "masks": controller.masks,
        "generator": controller.generator.get_state(),
    }


def own_batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of each four, so that both ranks together see the four of one step."""
    return [batch for index, batch in enumerate(make_batches(12)) if index // 2 % 2 == rank]


def resurrections(result: TrainingResult) -> list[int]:
    return [stats.commit["weights"]["total"]["resurrected"] for stats in result.history]


# -- runs --------------------------------------------------------------------------------------
def averaged(rank: int, *, give_wrapper: bool, **changes: object) -> dict[str, object]:
    """Two batches a step on each rank; the reductions are counted."""
    model = make_model()
    ddp = DistributedDataParallel(model)
    reductions = []

    def count(_state, bucket):
        reductions.append(bucket.index())
        future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, count)
    given, loss = (ddp, loss_fn) if give_wrapper else (model, lambda _, batch: loss_fn(ddp, batch))
    trainer = Trainer(given, adamw(model), loss, config(accumulate=2, **changes))
    result = trainer.fit(own_batches(rank))
    losses = [record["loss"] for record in result.stats if record["event"] == "step"]
    return {
        **weights_and_masks(model),
        "reductions": len(reductions),
        "losses": losses,
        "commits": resurrections(result),
    }


class _Random(torch.utils.data.Dataset):
    def __len__(self):
        return 44

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(8, generator=generator), torch.randn(4, generator=generator)


def loader() -> DataLoader:
    data = _Random()
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, seed=3))


def build(folder: Path, stats: Path, seed: int = 0) -> tuple[Trainer, nn.Module]:
    """Dropout, whose masks each rank draws for itself, and theta from noise."""
    model = make_model(dropout=0.3)
    torch.manual_seed(seed)
    ddp = DistributedDataParallel(model)
    changes = {
        "checkpoint": CheckpointConfig(str(folder), every=STEPS_OF_SAVED, keep=9),
        "stats": str(stats),
        "resurrection": ResurrectionConfig(lr=0.05, rule="adam", init="normal"),
    }
    return Trainer(ddp, adamw(model), loss_fn, config(**changes), progress=True), model


def resumed(rank: int, root: Path) -> dict[str, object]:
    writes = []
    save = checkpoint.save_checkpoint

    def counted(*args, **kwargs):
        writes.append(rank)
        return save(*args, **kwargs)

    checkpoint.save_checkpoint = counted
    whole, model = build(root / "whole", root / "whole.jsonl", seed=100 + rank)
    batches = loader()
    expected = whole.fit(batches)
    random = torch.get_rng_state()
    checkpoint.save_checkpoint = save
    if rank == 0:
        name = f"step-{STEPS_OF_SAVED:08d}"
        shutil.copytree(root / "whole" / name, root / "half" / name)
        shutil.copy(root / "whole.jsonl", root / "half.jsonl")
    dist.barrier()
    second, again = build(root / "half", root / "half.jsonl")
    result = second.fit(loader(), resume=True)
    return {
        "whole": weights_and_masks(model),
        "again": weights_and_masks(again),
        "writes": len(writes),
        "same history": result.history == expected.history,
        "steps": result.steps,
        "random": random,
        "random again": torch.get_rng_state(),
        "epoch": batches.sampler.epoch,
        "bars": [bar._bar is not None for bar in whole.callbacks],
    }


def calibrated(rank: int, **changes: object) -> dict[str, object]:
    """Inputs of each rank's own; what it would have chosen is kept beside what was chosen."""
    model = make_model()
    ddp = DistributedDataParallel(model)
    scale = torch.linspace(0.1, 4.0, 8)
    inputs = torch.randn(16, 8) * (scale if rank == 0 else scale.flip(0))
    calibration = [inputs] * (1 + rank)  # another number of draws, too
    trainer = Trainer(
        ddp, adamw(model), loss_fn, config(steps=20, **changes), calibration=calibration
    )
    controller = trainer.cycle.controller
    agree, choices, agreed = controller.agree, [], []

    def watched(found, masks):
        choices.append({name: mask.clone() for name, mask in masks.items()})
        together = agree(found, masks)
        agreed.append(dict(together))
        return together

    controller.agree = watched
    trainer.fit(own_batches(rank))
    return {**weights_and_masks(model), "choices": choices, "agreed": agreed}


def sparsified_before(rank: int) -> dict[str, object]:
    """Random masks by seeds of their own, before the wrapper and before the trainer."""
    model = make_model()
    resu.sparsify(model, 0.5, method="random", seed=rank, compile=False)
    before = resu.controller(model).masks
    ddp = DistributedDataParallel(model)
    begins_sparse = config(steps=20, warmup=0.0, initial_sparsity=0.5)
    trainer = Trainer(ddp, adamw(model), loss_fn, begins_sparse)
    trainer.cycle.start()
    begun = resu.controller(model).masks
    trainer.fit(own_batches(rank))
    other = make_model()
    resu.sparsify(other, 0.5, method="random", seed=rank, compile=False)
    sync_masks(resu.controller(other))
    return {
        **weights_and_masks(model),
        "before": before,
        "begun": begun,
        "synced": weights_and_masks(other),
    }


def own_loop(rank: int) -> dict[str, object]:
    model = make_model()
    ddp = DistributedDataParallel(model)
    cycle = Cycle(ddp, config(steps=20)).start()
    optimizer = adamw(ddp)
    batches = own_batches(rank)
    while not cycle.done:
        loss_fn(ddp, batches[cycle.step_index % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
    return {
        **weights_and_masks(cycle.finish()),
        "is plain": cycle.model is model,
        "agrees no more": resu.controller(model).agree is None,
    }


def by_method(rank: int, name: str) -> dict[str, object]:
    """Seeds and batches of each rank's own."""
    model = make_model()
    ddp = DistributedDataParallel(model)
    options = {} if name == "sr_ste" else {"every": 3}
    run = SparseTraining(
        ddp,
        TrainingConfig(
            method=name, method_options=options, steps=16, sparsity=0.75, seed=rank, compile=False
        ),
    ).start()
    optimizer = adamw(ddp)
    batches = own_batches(rank)
    while not run.done:
        loss_fn(ddp, batches[run.step % len(batches)]).backward()
        run.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
    run.finish()
    return {**weights_and_masks(model), "grown": sum(update.grown for update in run.updates)}


def early_stop(rank: int) -> dict[str, object]:
    """Rank 0 never gets better and rank 1 always does."""
    model = make_model()
    calls = []

    def evaluate(found: nn.Module) -> dict[str, float]:
        calls.append(found is model)
        return {"loss": 1.0 if rank == 0 else 1.0 / len(calls)}

    class Heard(Callback):
        metrics = ()

        def on_evaluate(self, _trainer, metrics):
            self.metrics += (metrics["loss"],)

    heard = Heard()
    changes = {"early_stop": EarlyStop("loss", patience=2), "evaluate_every": 2}
    trainer = Trainer(
        DistributedDataParallel(model),
        adamw(model),
        loss_fn,
        config(**changes),
        evaluate=evaluate,
        callbacks=[heard],
    )
    result = trainer.fit(own_batches(rank))
    return {
        "steps": result.steps,
        "stopped": result.stopped_early,
        "plain": all(calls),
        "heard": list(heard.metrics),
    }


def errors(rank: int, root: Path) -> dict[str, str]:
    """Each of them has to come on both ranks: a rank that went on alone would wait for ever."""
    found = {}

    def note(name, action):
        try:
            action()
        except (ResuCompileError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    def train(given, loss=loss_fn, changes=None, model=None):
        trainer = Trainer(given, adamw(model or given), loss, config(**(changes or {})))
        return trainer.fit(own_batches(rank))

    def nan_once(model, batch):
        nan_once.calls += 1
        value = loss_fn(model, batch)
        return value * float("nan") if rank == 1 and nan_once.calls == 7 else value

    nan_once.calls = 0
    note("nan", lambda: train(DistributedDataParallel(make_model()), nan_once))
    note("no wrapper", lambda: train(make_model()))
    used = {"checkpoint": CheckpointConfig(str(root / "whole"))}
    note("used", lambda: train(DistributedDataParallel(make_model()), changes=used))

    def refuse(*_args, **_kwargs):
        raise OSError("disk full")

    save, checkpoint.save_checkpoint = checkpoint.save_checkpoint, refuse
    full = CheckpointConfig(str(root / "full"), every=4)
    note("full", lambda: train(DistributedDataParallel(make_model()), changes={"checkpoint": full}))
    checkpoint.save_checkpoint = save

    def another_folder():
        folder = root / ("whole" if rank == 0 else "nothing")
        trainer, _ = build(folder, root / "unused.jsonl")
        trainer.fit(loader(), resume=True)

    note("folder", another_folder)

    def wrapper_sparsified():
        ddp = DistributedDataParallel(make_model())
        resu.sparsify(ddp, 0.5, compile=False)
        train(ddp)

    note("wrapper sparsified", wrapper_sparsified)

    def part_of_ranks():
        groups = [dist.new_group([0]), dist.new_group([1])]
        train(DistributedDataParallel(make_model(), process_group=groups[rank]))

    note("group", part_of_ranks)
    return found


def example(root: Path) -> dict[str, object]:
    """The example of the documentation, on the CPU."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "init_process_group" in block)
    for old, new in {
        'dist.init_process_group("nccl")\n': "",
        "torch.cuda.set_device(device)\n": "",
        '"cuda", int(os.environ["LOCAL_RANK"])': '"cpu"',
        "steps=5000": "steps=40, cycles=5, compile=False",
        "runs/first": str(root / "example"),
        "dist.destroy_process_group()\n": "",
    }.items():
        assert old in code
        code = code.replace(old, new)
    names = {
        "model": make_model(),
        "dataset": _Random(),
        "loss_fn": loss_fn,
        "evaluate": lambda _: {"loss": 0.0},
    }
    exec(code, names)
    return {**weights_and_masks(names["model"]), "steps": names["result"].steps}
