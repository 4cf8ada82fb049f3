"""Images in folders by class, as ImageNet's are, read by Pillow.

    train/n01440764/n01440764_10026.JPEG

Training takes a random part of each image, at random mirrored; validation and test its middle.

Source of the parts: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842: area 8 to 100 %, sides
from 3:4 to 4:3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from resu_compile.errors import ArgumentError
from resu_compile.experiments.tasks.registry import import_extra

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpeg", ".jpg", ".png")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIDDLE = 224 / 256  # share of the shorter side that a test image keeps
TRIES = 10

Sample = tuple[Path, int]


def find_images(
    folder: Path, classes: Sequence[str] | None = None
) -> tuple[list[str], list[Sample]]:
    """Classes and images of a folder, sorted.

    Args:
        folder: of one folder for each class.
        classes: that there have to be; None takes those that are there.

    Returns:
        Names of the classes; path and class of each image.

    Raises:
        ArgumentError: there is no such folder, or no image in it, or it has other classes.
    """
    if not folder.is_dir():
        raise ArgumentError(f"folder: expected {folder} with one folder for each class, got none")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if classes is not None and found != list(classes):
        raise ArgumentError(
            f"{folder}: expected the {len(classes)} classes of the training images, got "
            f"{len(found)} of which {len(set(found) - set(classes))} are unknown"
        )
    samples = [
        (path, number)
        for number, name in enumerate(found)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not samples:
        raise ArgumentError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found none")
    return found, samples


class FolderImages(Dataset[tuple[Tensor, int]]):
    """The images of ``samples`` as normalized tensors (3, size, size), with their classes.

    Args:
        samples: path and class.
        size: pixels of a side.
        training: take a random part, drawn from torch's global generator.
    """

    def __init__(self, samples: Sequence[Sample], *, size: int, training: bool) -> None:
        self.samples = list(samples)
        self.size = size
        self.training = training
        self._open = import_extra("PIL.Image", task="imagenet").open

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        with self._open(path) as opened:
            image = opened.convert("RGB")
        box = random_part(*image.size) if self.training else middle(*image.size)
        image = image.resize((self.size, self.size), resample=2, box=box)  # 2: bilinear
        pixels = to_tensor(image, self.size)
        if self.training and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return pixels, label


def to_tensor(image: Image | Any, size: int) -> Tensor:
    """An RGB image as float32 (3, size, size), with ImageNet's mean and deviation taken out."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = data.view(size, size, 3).permute(2, 0, 1).float() / 255.0
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def random_part(width: int, height: int) -> Box:
    """A part of an image: area 8 to 100 %, sides 3:4 to 4:3; the middle if none fits."""
    for _ in range(TRIES):
        area = width * height * (0.08 + 0.92 * torch.rand(()).item())
        ratio = math.exp(math.log(3 / 4) + torch.rand(()).item() * 2 * math.log(4 / 3))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(torch.randint(width - wide + 1, ()))
            top = int(torch.randint(height - high + 1, ()))
            return left, top, left + wide, top + high
    return middle(width, height)


def middle(width: int, height: int) -> Box:
    """The square in the middle, ``MIDDLE`` of the shorter side."""
    side = MIDDLE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
