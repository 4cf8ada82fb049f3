"""The checkpoint that a run goes on from, and none for a run that begins."""

from __future__ import annotations

from typing import Any

from resu_compile.errors import ArgumentError
from resu_compile.training.checkpoint import latest_checkpoint, load_checkpoint
from resu_compile.training.distributed import gather, on_first, world_size


def newest_state(folder: str) -> Any:
    """What the newest checkpoint in ``folder`` holds; None if there is none.

    Raises:
        ArgumentError: the ranks do not see the same one.
        ArtifactError: none of those that are there can be read.
    """
    state = None if latest_checkpoint(folder) is None else load_checkpoint(folder)
    steps = gather(None if state is None else state["trainer"]["step"])
    if any(step != steps[0] for step in steps):
        raise ArgumentError(
            f"checkpoint: expected the same newest checkpoint in {folder} on all ranks, got those "
            f"of steps {', '.join(map(str, steps))}; the folder has to be on a disk that all see"
        )
    return state


def check_unused(folder: str) -> None:
    """Raise an error if ``folder`` has checkpoints, which a later resume would take for its own."""

    def check() -> None:
        found = latest_checkpoint(folder)
        if found is not None:
            raise ArgumentError(
                f"checkpoint: expected a folder without checkpoints for a fresh run, got {folder} "
                f"with {found.name}; pass resume=True to go on from it, or another folder"
            )

    on_first(check)


def check_world(saved: int) -> None:
    """Raise an error unless there are as many ranks as in the saved run."""
    if saved != world_size():
        raise ArgumentError(
            f"state: expected {saved} rank(s), as in the saved run, because each has random states "
            f"and a position in the data of its own, got {world_size()}; resume with as many, or "
            "begin a new run from the weights, load_checkpoint(folder)['model']"
        )
