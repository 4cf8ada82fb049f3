"""Checkpoints that exist whole or not at all, and hold no pickle.

    folder/
      step-00001200/
        tensors.safetensors      every tensor, under its place in the tree
        state.json               the rest of the tree, versions, and checksums of both

A checkpoint is written under a temporary name, flushed to the disk and then renamed, so that a
kill at any moment leaves every finished one as it was. Removal is the reverse: renamed, then
deleted. A folder belongs to one run: one process writes to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError, ArtifactError, check_integer
from resu_compile.training.tree import decode_tree, encode_tree

log = logging.getLogger(__name__)

FORMAT = "resu_compile.checkpoint"
FORMAT_VERSION = 1
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"

_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_TEMPORARY = ".tmp-"


def save_checkpoint(folder: str | os.PathLike[str], state: Any, *, step: int, keep: int) -> Path:
    """Write a checkpoint of ``state`` and remove the oldest ones.

    A tensor that stands at several places of ``state`` is stored once and loads as one tensor.
    Strides, ``requires_grad`` and the device are not kept. Saving a step that is there already
    writes ``step-00001200-2`` beside it before the old one goes.

    Args:
        folder: where the checkpoints of the run are; made if it is not there.
        state: dicts (keys: str, int, float, bool, None), lists, tuples, str, int, float, bool,
            None and tensors, nested.
        step: training step, >= 0; what checkpoints are ordered by.
        keep: how many of the newest up to ``step`` stay, >= 1. Those of later steps, which
            another run must have left, are never removed.

    Returns:
        The checkpoint's folder.

    Raises:
        ArgumentTypeError: a value in ``state`` cannot be stored; the message names its place.
        ArgumentError: ``step`` or ``keep`` is out of range, or safetensors is not installed.
        OSError: the disk refuses; every earlier checkpoint is as it was.
    """
    check_integer(step, name="step")
    check_integer(keep, name="keep", minimum=1)
    root = Path(folder)
    _import_safetensors()
    tree, tensors = encode_tree(state)
    _make_folder(root)
    _remove_leftovers(root)
    temporary = root / f"{_TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        _write(temporary, tree, tensors, step)
        target = _free_target(root, step)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(root)
    _remove_old(root, target, step, keep)
    return target


def load_checkpoint(
    path_or_folder: str | os.PathLike[str], *, device: str | torch.device | None = None
) -> Any:
    """The state of one checkpoint, or of the newest one in a folder that can be read.

    Args:
        path_or_folder: what ``save_checkpoint`` returned, or the folder it was given. In a folder,
            a checkpoint that is damaged is passed over for the one before it, with a warning.
        device: where to put the tensors; None means the CPU, where random states have to be and
            from where ``load_state_dict`` of models and optimizers copies to the right device.

    Raises:
        ArtifactError: there is no checkpoint, or none that can be read.
        ArgumentError: safetensors is not installed.
    """
    path = Path(path_or_folder)
    if _NAME.fullmatch(path.name) or (path / STATE_FILE).exists():
        return _read(path, device)
    found = list_checkpoints(path)
    if not found:
        raise ArtifactError(
            f"{path}: expected a checkpoint or a folder of them (step-00000000, ...), got neither; "
            "check the path, or start without resuming"
        )
    for checkpoint in reversed(found):
        try:
            return _read(checkpoint, device)
        except ArtifactError as error:
            if checkpoint == found[0]:
                raise
            log.warning("%s; trying the checkpoint before it", error)
    raise AssertionError("unreachable")


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The finished checkpoints in ``folder``, oldest first; empty if there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), key=_order)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest finished checkpoint in ``folder``, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


# -- writing ---------------------------------------------------------------------------------
def _write(path: Path, tree: object, tensors: dict[str, Tensor], step: int) -> None:
    safetensors = _import_safetensors()
    tensors_path = path / TENSORS_FILE
    try:
        safetensors.torch.save_file(tensors, tensors_path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{tensors_path}: could not be written ({error})") from error
    with tensors_path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "torch_version": str(torch.__version__),
        "package_version": _package_version(),
        "tensors_sha256": digest,
        "tree_sha256": _tree_digest(tree),
        "tree": tree,
    }
    with (path / STATE_FILE).open("w", encoding="ascii") as text:
        json.dump(document, text, allow_nan=False)
        text.flush()
        os.fsync(text.fileno())
    _sync(path)


def _free_target(root: Path, step: int) -> Path:
    same = [attempt for number, attempt in map(_order, list_checkpoints(root)) if number == step]
    name = f"step-{step:08d}"
    return root / (f"{name}-{max(same) + 1}" if same else name)


def _make_folder(root: Path) -> None:
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        _sync(root.parent)


def _sync(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk."""
    if os.name == "nt":  # Windows opens no folders; its file system keeps a journal of renames
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- removing --------------------------------------------------------------------------------
def _remove_old(root: Path, newest: Path, step: int, keep: int) -> None:
    found = list_checkpoints(root)
    later = [path for path in found if _order(path)[0] > step]
    if later:
        log.warning(
            "%s: holds checkpoints of later steps than the one just saved, up to %s; a resumed run "
            "starts there; use another folder for another run, or remove them",
            root,
            later[-1].name,
        )
    # of one step only the last attempt is worth keeping
    own = {_order(path)[0]: path for path in found if _order(path)[0] <= step}
    kept = {own[number] for number in sorted(own)[-keep:]} | {newest, *later}
    for path in found:
        if path in kept:
            continue
        with _logged(path):
            doomed = root / f"{_TEMPORARY}{uuid.uuid4().hex}"
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        with _logged(path):
            shutil.rmtree(path)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """A file that cannot be removed is no reason to end a training run."""
    try:
        yield
    except OSError as error:
        log.warning("%s: could not be removed (%s)", path, error)


# -- reading ---------------------------------------------------------------------------------
def _read(path: Path, device: str | torch.device | None) -> Any:
    document = _read_document(path / STATE_FILE)
    tensors = _read_tensors(path / TENSORS_FILE, document["tensors_sha256"], device)
    try:
        return decode_tree(document["tree"], tensors)
    except (ValueError, TypeError, RuntimeError, AttributeError, RecursionError) as error:
        raise _damaged(path / STATE_FILE, f"a tree that fits the tensors ({error})") from error


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise _damaged(path, f"a file that can be read ({error})") from error
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError
        raise _damaged(path, f"JSON, got something else ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _damaged(path, f"format {FORMAT!r}, got something else")
    if document.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: expected format version {FORMAT_VERSION}, got "
            f"{document.get('format_version')!r}, written by resu_compile "
            f"{document.get('package_version')} with torch {document.get('torch_version')}; "
            "load it with that release"
        )
    if "tensors_sha256" not in document or "tree" not in document:
        raise _damaged(path, "the entries tree and tensors_sha256, got neither or one")
    if document.get("tree_sha256") != _tree_digest(document["tree"]):
        raise _damaged(path, "the tree whose checksum it holds, got another")
    return document


def _read_tensors(path: Path, digest: str, device: str | torch.device | None) -> dict[str, Tensor]:
    safetensors = _import_safetensors()
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path, f"a file that can be read ({error})") from error
    if found != digest:
        raise _damaged(path, f"sha256 {digest}, got {found}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # a copy: what is read is a view of the file, which may be removed or replaced later
            return {
                name: file.get_tensor(name).to(device=device or "cpu", copy=True)
                for name in file.keys()  # noqa: SIM118  (not a dict)
            }
    except safetensors.SafetensorError as error:
        raise _damaged(path, f"a safetensors file ({error})") from error


def _damaged(path: Path, expected: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: expected {expected}; the checkpoint is damaged: load an older one, "
        "or pass the folder of all to take the newest that is whole"
    )


# -- small things ----------------------------------------------------------------------------
def _order(path: Path) -> tuple[int, int]:
    """Step and attempt that the name of a checkpoint says."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def _tree_digest(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree).encode("ascii")).hexdigest()


def _package_version() -> str:
    try:
        return version("resu-compile")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"


def _import_safetensors() -> ModuleType:
    try:
        import_module("safetensors.torch")
        return import_module("safetensors")
    except ImportError as error:
        raise ArgumentError(
            f"checkpoint: expected safetensors and numpy to be installed, got {error}; "
            "pip install resu-compile[train]"
        ) from error
