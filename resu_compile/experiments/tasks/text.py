"""A GPT over bytes: on the standard library's source, or on WikiText from a folder.

The standard library is split by file: a tenth of the files validates (the tenth that the demo holds
out), another tenth tests, the rest trains.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from resu_compile.errors import ArgumentError, check_choice
from resu_compile.experiments.tasks.recipe import Split, adamw, loss_of, schedule
from resu_compile.experiments.tasks.registry import (
    ExperimentTask,
    check_torch_device,
    import_extra,
    register_task,
)

SPLITS = ("train", "validation", "test")
WIKI_NAMES = {"train": "train", "validation": "valid", "test": "test"}  # wiki.valid.raw
SHARE = 0.1  # of the files, in validation and in test


@dataclass(frozen=True)
class GPTSize:
    """A GPT over bytes, and what it is trained on in one step.

    Attributes:
        width: of the layers.
        layers: how many.
        heads: of the attention.
        context: bytes in a window.
        batch_size: windows in a batch.
        lr: highest learning rate.
        eval_batches: batches of validation, and of test, spread evenly over the text.
        max_bytes: of each split that are used.
        autocast: dtype of mixed precision on a GPU.
    """

    width: int
    layers: int
    heads: int
    context: int
    batch_size: int
    lr: float
    eval_batches: int
    max_bytes: int = 1 << 40
    autocast: Literal["bfloat16", "float16"] | None = None


SIZES = {
    "tiny": GPTSize(32, 1, 2, 32, 4, 3e-3, 2, max_bytes=200_000),
    "small": GPTSize(128, 3, 4, 128, 16, 3e-3, 24),
    "large": GPTSize(384, 6, 6, 256, 64, 1e-3, 80, autocast="bfloat16"),  # 10.6 M weights
}


@register_task("bytes")
def standard_library(
    *, steps: int, seed: int, size: str = "small", lr: float | None = None, device: str = "cpu"
) -> ExperimentTask:
    """The source of Python's standard library.

    Args:
        steps: of the run.
        seed: of initial weights and batches.
        size: one of ``SIZES``; ``"large"`` has 6 layers of width 384 and wants a GPU.
        lr: highest learning rate; None is that of the size.
        device: where model and data live.
    """
    check_choice(size, SIZES, name="size")
    texts = library_texts(SIZES[size].max_bytes)
    return byte_task(texts, _with_lr(SIZES[size], lr), steps=steps, seed=seed, device=device)


@register_task("wikitext")
def wikitext(
    *,
    steps: int,
    seed: int,
    folder: str,
    size: str = "large",
    lr: float | None = None,
    device: str = "cpu",
) -> ExperimentTask:
    """WikiText from a local folder, byte by byte.

    Args:
        steps: of the run.
        seed: of initial weights and batches.
        folder: holds ``wiki.train.raw``, ``wiki.valid.raw`` and ``wiki.test.raw`` (or
            ``.tokens``), or what ``datasets`` reads: a dataset that was saved to the disk, or
            parquet files of the three splits.
        size: one of ``SIZES``.
        lr: highest learning rate; None is that of the size.
        device: where model and data live.
    """
    check_choice(size, SIZES, name="size")
    texts = read_wikitext(folder, SIZES[size].max_bytes)
    return byte_task(texts, _with_lr(SIZES[size], lr), steps=steps, seed=seed, device=device)


def byte_task(
    texts: dict[str, Tensor], size: GPTSize, *, steps: int, seed: int, device: str
) -> ExperimentTask:
    """The task of predicting the next byte.

    Args:
        texts: for each of ``SPLITS`` its bytes, uint8, (length,).
        size: of the GPT.
        steps: of the run.
        seed: of initial weights and batches.
        device: where model and data live.
    """
    from resu_compile.demo.tasks import ByteGPT

    where = check_torch_device(device)
    for name, text in texts.items():
        if text.numel() < size.context + 2:
            raise ArgumentError(
                f"{name} text: expected more than {size.context + 1} bytes, which are one window, "
                f"got {text.numel()}"
            )
    on_device = {name: text.to(where) for name, text in texts.items()}
    torch.manual_seed(seed)
    model = ByteGPT(size.width, size.layers, size.heads, size.context).to(where)
    optimizer = adamw(model, lr=size.lr, weight_decay=0.1)
    return ExperimentTask(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_of,
        batches=partial(_batches, on_device["train"], size, seed),
        evaluate=partial(bits_per_byte, on_device["validation"], size),
        test=partial(bits_per_byte, on_device["test"], size),
        on_training=partial(bits_per_byte, on_device["train"], size),
        scheduler=schedule(optimizer, steps),
        metric="bits per byte",
        example=(windows(on_device["train"], torch.zeros(1, dtype=torch.int64), size.context)[0],),
        autocast=size.autocast if where.type == "cuda" else None,
    )


def windows(text: Tensor, starts: Tensor, context: int) -> Split:
    """Bytes and next bytes of the windows that begin at ``starts``; each (windows, context)."""
    offsets = torch.arange(context + 1, device=text.device)
    starts = starts.to(text.device, non_blocking=True)  # the host does not wait for the GPU
    found = text[starts[:, None] + offsets].long()  # (windows, context + 1)
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def bits_per_byte(text: Tensor, size: GPTSize, model: nn.Module) -> dict[str, float]:
    """Bits per byte and loss in nats, over windows spread evenly over ``text``."""
    count = size.eval_batches * size.batch_size
    last = text.numel() - size.context - 1
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()
    losses = [
        loss_of(model, windows(text, part, size.context)) for part in starts.split(size.batch_size)
    ]
    loss = torch.stack(losses).double().mean().item()
    return {"bits per byte": loss / math.log(2.0), "loss": loss}


# -- reading -----------------------------------------------------------------------------------
@lru_cache(maxsize=2)
def library_texts(max_bytes: int) -> dict[str, Tensor]:
    """The bytes of the three splits of the standard library; not to be written into.

    Args:
        max_bytes: of each split that are read.
    """
    from resu_compile.demo.tasks import standard_library_files

    files = standard_library_files()
    random.Random(0).shuffle(files)
    edge = int(len(files) * SHARE)
    parts = {
        "validation": files[:edge],
        "test": files[edge : 2 * edge],
        "train": files[2 * edge :],
    }
    return {name: _read(found, max_bytes) for name, found in parts.items()}


def read_wikitext(folder: str, max_bytes: int = 1 << 40) -> dict[str, Tensor]:
    """The bytes of the three splits in ``folder``, as ``wikitext`` finds them.

    Raises:
        ArgumentError: there are no such files, or ``datasets`` is needed and not installed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArgumentError(f"folder: expected a folder with WikiText, got {folder!r}")
    found = {split: _raw_file(root, name) for split, name in WIKI_NAMES.items()}
    if any(found.values()):
        missing = [WIKI_NAMES[split] for split, path in found.items() if path is None]
        if missing:
            raise ArgumentError(
                f"folder: expected wiki.{missing[0]}.raw or wiki.{missing[0]}.tokens in {folder}, "
                "beside the other splits, got neither"
            )
        return {split: _read([path], max_bytes) for split, path in found.items() if path}
    datasets = import_extra("datasets", task="wikitext")
    try:
        if (root / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(root))
        else:
            loaded = datasets.load_dataset(str(root))
    except (ValueError, OSError) as error:
        raise ArgumentError(
            f"folder: expected wiki.*.raw, or a dataset of datasets, in {folder}, got: {error}"
        ) from error
    for split in SPLITS:
        if split not in loaded or "text" not in loaded[split].column_names:
            raise ArgumentError(
                f"folder: expected a split {split!r} with a column 'text' in {folder}, got "
                f"{ {name: part.column_names for name, part in loaded.items()} }"
            )
    return {split: _joined(loaded[split]["text"], max_bytes) for split in SPLITS}


def _raw_file(root: Path, name: str) -> Path | None:
    candidates = [root / f"wiki.{name}.{suffix}" for suffix in ("raw", "tokens")]
    return next((path for path in candidates if path.is_file()), None)


def _joined(lines: list[str], max_bytes: int) -> Tensor:
    text = bytearray()
    for line in lines:
        text += line.encode()
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def _read(files: list[Path], max_bytes: int) -> Tensor:
    text = bytearray()
    for path in files:
        text += path.read_bytes() + b"\n"
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def _batches(text: Tensor, size: GPTSize, seed: int, epoch: int) -> Iterator[Split]:
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    last = text.numel() - size.context - 1
    for _ in range(max(1, text.numel() // (size.batch_size * size.context))):
        starts = torch.randint(last, (size.batch_size,), generator=generator)
        yield windows(text, starts, size.context)


def _with_lr(size: GPTSize, lr: float | None) -> GPTSize:
    return size if lr is None else replace(size, lr=lr)
