"""Images from folders: CIFAR-10 and CIFAR-100 with ResNet-20, ImageNet with ResNet-50.

CIFAR has no validation split of its own: the last tenth of the training images, in an order that is
always the same, validates. Of an ImageNet folder ``val`` tests and a twentieth of ``train``
validates.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resu_compile.errors import ArgumentError, check_choice
from resu_compile.experiments.tasks.image_folder import FolderImages, Sample, find_images
from resu_compile.experiments.tasks.recipe import (
    Classification,
    Split,
    loss_of,
    schedule,
    score_classifier,
    splits_of,
)
from resu_compile.experiments.tasks.registry import (
    ExperimentTask,
    check_torch_device,
    register_task,
)
from resu_compile.experiments.tasks.resnet import resnet20, resnet50

VALIDATION_SHARE = 0.1
FOLDER_VALIDATION_SHARE = 0.05
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PAD = 4  # pixels around a CIFAR image, of which a crop is taken


@dataclass(frozen=True)
class CifarFiles:
    """Where a CIFAR data set keeps its images.

    Attributes:
        folder: inside the user's.
        train: files of it.
        test: file of it.
        labels: key of the labels.
        classes: how many.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: int


CIFAR = {
    "cifar10": CifarFiles(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        b"labels",
        10,
    ),
    "cifar100": CifarFiles("cifar-100-python", ("train",), "test", b"fine_labels", 100),
}


def _cifar(
    name: str,
    *,
    steps: int,
    seed: int,
    folder: str,
    width: int = 16,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    device: str = "cpu",
) -> ExperimentTask:
    files = CIFAR[name]
    where = check_torch_device(device)
    images, labels = read_cifar(folder, name, train=True)
    train, validation = splits_of(len(labels), 1.0 - VALIDATION_SHARE)

    def split(found: Split) -> Split:
        normal = normalized(found[0], CIFAR_MEAN, CIFAR_STD)
        return normal.to(where), found[1].to(where)

    data = Classification(
        split((images[train], labels[train])),
        split((images[validation], labels[validation])),
        split(read_cifar(folder, name, train=False)),
        min(batch_size, len(train)),
    )
    torch.manual_seed(seed)
    model = resnet20(files.classes, width=width).to(where)
    return data.task(
        model,
        _sgd(model, lr, weight_decay),
        steps=steps,
        seed=seed,
        change=partial(flip_and_crop, seed=seed),
    )


@register_task("cifar10")
def cifar10(*, steps: int, seed: int, folder: str, **options: Any) -> ExperimentTask:
    """CIFAR-10 with ResNet-20, by SGD, images flipped and shifted.

    Args:
        steps: of the run.
        seed: of initial weights and batches.
        folder: holds ``cifar-10-batches-py``, the Python version from
            https://www.cs.toronto.edu/~kriz/cifar.html
        **options: ``width`` (16), ``batch_size`` (128), ``lr`` (0.1), ``weight_decay`` (5e-4) and
            ``device``.
    """
    return _cifar("cifar10", steps=steps, seed=seed, folder=folder, **options)


@register_task("cifar100")
def cifar100(*, steps: int, seed: int, folder: str, **options: Any) -> ExperimentTask:
    """CIFAR-100 with ResNet-20, by SGD, images flipped and shifted.

    Args:
        steps: of the run.
        seed: of initial weights and batches.
        folder: holds ``cifar-100-python``.
        **options: those of ``cifar10``.
    """
    return _cifar("cifar100", steps=steps, seed=seed, folder=folder, **options)


@register_task("imagenet")
def imagenet(
    *,
    steps: int,
    seed: int,
    folder: str,
    width: int = 64,
    size: int = 224,
    batch_size: int = 256,
    lr: float = 0.1,
    weight_decay: float = 1e-4,
    workers: int = 8,
    device: str = "cpu",
) -> ExperimentTask:
    """ImageNet, or any folder of images by class, with ResNet-50 by SGD.

    Args:
        steps: of the run.
        seed: of initial weights and batches.
        folder: holds ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``.
        width: of the first stage; ResNet-50 has 64.
        size: pixels of a side.
        batch_size: of training.
        lr: highest learning rate.
        weight_decay: of SGD.
        workers: processes that read images; 0 reads in this one.
        device: where the model lives.
    """
    where = check_torch_device(device)
    classes, found = find_images(Path(folder) / "train")
    _, tested = find_images(Path(folder) / "val", classes)
    train, validation = splits_of(len(found), 1.0 - FOLDER_VALIDATION_SHARE)
    if not len(train) or not len(validation):
        raise ArgumentError(f"folder: expected 20 training images or more, got {len(found)}")

    def loader(samples: Sequence[Sample], *, training: bool) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(
            FolderImages(samples, size=size, training=training),
            batch_size=min(batch_size, len(samples)),
            shuffle=training,
            drop_last=training,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=where.type == "cuda",
            generator=generator,
        )

    def score(batches: Any, model: nn.Module) -> dict[str, float]:
        return score_classifier(model, (_on(batch, where) for batch in batches))

    torch.manual_seed(seed)
    model = resnet50(len(classes), width=width).to(where)
    optimizer = _sgd(model, lr, weight_decay)
    return ExperimentTask(
        model=model,
        optimizer=optimizer,
        loss_fn=lambda model, batch: loss_of(model, _on(batch, where)),
        batches=loader([found[i] for i in train.tolist()], training=True),
        evaluate=partial(score, loader([found[i] for i in validation.tolist()], training=False)),
        test=partial(score, loader(tested, training=False)),
        scheduler=schedule(optimizer, steps),
        metric="accuracy",
        higher_is_better=True,
        example=(torch.zeros(1, 3, size, size, device=where),),
        autocast="bfloat16" if where.type == "cuda" else None,
    )


def _on(batch: Sequence[Tensor], device: torch.device) -> Split:
    images, labels = (value.to(device, non_blocking=True) for value in batch)
    return images, labels


def _sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay, nesterov=True
    )


# -- CIFAR -------------------------------------------------------------------------------------
def normalized(data: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float images with mean 0 and deviation 1 in each channel.

    Args:
        data: uint8, (images, 3, h, w).
        mean: of each channel, of images in [0, 1].
        std: of each channel.

    Returns:
        float32, the same shape.
    """
    centre, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    return (data.float() / 255.0 - centre) / scale


def flip_and_crop(batch: Split, number: int, *, seed: int) -> Split:
    """Images mirrored at random, and cropped at random from themselves with a border of zeros.

    Args:
        batch: images (batch, 3, h, w) and labels.
        number: of the batch in the run; with ``seed`` it determines all that is drawn.
        seed: of the run.
    """
    images, labels = batch
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + 7 * number)
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    mirrored = mirrored.to(images.device, non_blocking=True)
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    border = F.pad(images, (PAD, PAD, PAD, PAD))
    shifts = torch.randint(2 * PAD + 1, (2, count), generator=generator)
    top, left = shifts.to(images.device, non_blocking=True)
    rows = top[:, None] + torch.arange(height, device=images.device)  # (batch, h)
    columns = left[:, None] + torch.arange(width, device=images.device)  # (batch, w)
    which = torch.arange(count, device=images.device)[:, None, None]
    cropped = border.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous(), labels


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of NumPy arrays and plain data, and runs nothing else that one may hold."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        root = module.partition(".")[0]
        if name in self.ALLOWED and (root == "numpy" or (module, name) == ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of images")


def read_cifar(folder: str, name: str, *, train: bool) -> Split:
    """Images uint8 (count, 3, 32, 32) and labels of one part of a CIFAR data set.

    Args:
        folder: what holds the folder of its Python version, or that folder.
        name: ``"cifar10"`` or ``"cifar100"``.
        train: the training images; False the test images.

    Raises:
        ArgumentError: a file is missing, or holds something else.
    """
    files = CIFAR[check_choice(name, CIFAR, name="name")]
    root = Path(folder)
    root = root / files.folder if (root / files.folder).is_dir() else root
    images, labels = [], []
    for file in files.train if train else (files.test,):
        path = root / file
        if not path.is_file():
            raise ArgumentError(
                f"folder: expected {files.folder} with the Python version of {name} in {folder}, "
                f"got no {path.name}"
            )
        with path.open("rb") as opened:
            found = _unpickle(opened, path)
        try:
            pixels = torch.from_numpy(found[b"data"]).reshape(-1, 3, 32, 32)
            labels.append(torch.tensor(found[files.labels], dtype=torch.int64))
        except (KeyError, TypeError, RuntimeError) as error:
            raise ArgumentError(
                f"{path}: expected data (images, 3072) and {files.labels.decode()}: {error}"
            ) from error
        images.append(pixels)
    return torch.cat(images), torch.cat(labels)


def _unpickle(opened: IO[bytes], path: Path) -> Any:
    try:
        return _ArraysOnly(opened, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise ArgumentError(
            f"{path}: expected a file of CIFAR's Python version: {error}"
        ) from error
