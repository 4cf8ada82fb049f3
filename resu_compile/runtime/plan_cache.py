"""Measured times of the linear kernels: in memory, in the user's cache, in the shipped tables.

A time counts only for the device, dtype, shape, sparsity and way of launching that it was taken
with, and for the code of the kernel that it was taken of.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import tempfile
import threading
import tokenize
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resu_compile.kernels.packed_linear import default_format
from resu_compile.kernels.plan import Kernel

logger = logging.getLogger(__name__)

FORMAT = "resu_compile linear times"
VERSION = 2

SHIPPED = ("plans_h200.json", "plans_cpu.json")
DATA_FOLDER = Path(__file__).parent.parent / "data"
KERNEL_FOLDER = Path(__file__).parent.parent / "kernels"

_SOURCES = {  # how the names of its files begin
    Kernel.CSR: ("csr_linear",),
    Kernel.ROWS: ("row_group", "row_linear", "row_order", "row_weight"),
    Kernel.TILES: ("tile_",),
    Kernel.SEMI: ("semi_",),
}

Times = dict[int, dict[Kernel, float]]  # rows of x -> kernel -> milliseconds
Stored = dict[str, dict[str, float]]  # "8": {"dense": ms, "rows@0123abcd": ms}

lock = threading.RLock()


# -- what a time belongs to ------------------------------------------------------------------
@dataclass(frozen=True)
class TimesKey:
    """What the times of one weight depend on, the batch size and the kernel aside.

    Attributes:
        device: name of the GPU; model of the CPU, its vector instructions and threads.
        launch: ``"graph"`` or ``"calls"`` from Python; always calls on the CPU.
        dtype: dtype of x, weight and result, without ``torch.``.
        shape: (N, K).
        sparsity: rounded to hundredths, at most 0.99.
        pattern: ``"2:4"`` or empty.
        unpacked_from: the format that ``UNPACK`` expands on this device.
    """

    device: str
    launch: str
    dtype: str
    shape: tuple[int, int]
    sparsity: float
    pattern: str = ""
    unpacked_from: Kernel = Kernel.TILES

    @classmethod
    def of(
        cls,
        device: torch.device,
        out_features: int,
        in_features: int,
        sparsity: float,
        dtype: torch.dtype,
        *,
        cuda_graphs: bool,
        pattern: tuple[int, int] | None = None,
    ) -> TimesKey:
        """The key of a product on this machine."""
        return cls(
            device=device_name(device),
            launch="graph" if cuda_graphs and device.type == "cuda" else "calls",
            dtype=str(dtype).removeprefix("torch."),
            shape=(out_features, in_features),
            sparsity=rounded(sparsity),
            pattern=":".join(map(str, pattern)) if pattern else "",
            unpacked_from=default_format(device),
        )

    @property
    def text(self) -> str:
        """The key as files spell it; the device apart."""
        sparsity = f"{self.sparsity:.2f} {self.pattern}".strip()
        return f"{self.launch}|{self.dtype}|{self.shape[0]}x{self.shape[1]}|{sparsity}"


def rounded(sparsity: float) -> float:
    """Sparsity to its nearest hundredth, 0.99 at most."""
    return min(round(sparsity, 2), 0.99)


def device_name(device: torch.device) -> str:
    """What tells machines of different speed apart."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


@functools.cache
def _cpu_name() -> str:
    # a virtual machine may hide the model behind the name of the whole product line
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            label, _, value = line.partition(":")
            found.setdefault(label.strip(), value.strip())
    except OSError:
        pass  # not Linux
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= found.keys():
        name += f" {found['cpu family']}/{found['model']}"
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


# -- the code that was timed -----------------------------------------------------------------
@functools.cache
def code_hash(kernel: Kernel) -> str:
    """Eight hex digits of the code behind a packed format, comments aside; empty for DENSE."""
    if kernel is Kernel.DENSE:
        return ""
    digest = hashlib.sha256()
    for path in sorted(KERNEL_FOLDER.glob("*")):
        if path.name.startswith(_SOURCES[kernel]) and path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.name.encode())
            digest.update(strip_comments(path.read_text("utf-8"), path.suffix).encode())
    return digest.hexdigest()[:8]


def strip_comments(source: str, suffix: str) -> str:
    """The code of a ``.py`` or CUDA file: no comments, docstrings or white space."""
    if suffix != ".py":
        source = re.sub(r"(?s)/\*.*?\*/", "", source)
        return "".join(re.sub(r"//.*", "", source).split())
    lines = source.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(iter(lines).__next__))
    layout = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
    for i in reversed(range(len(tokens))):  # from the end, so that earlier positions hold
        token = tokens[i]
        alone = (i == 0 or tokens[i - 1].type in layout) and tokens[i + 1 : i + 2]
        is_docstring = token.type == tokenize.STRING and alone and alone[0].type == tokenize.NEWLINE
        if token.type == tokenize.COMMENT or is_docstring:
            (top, left), (bottom, right) = token.start, token.end
            joined = lines[top - 1][:left] + lines[bottom - 1][right:]
            lines[top - 1 : bottom] = [joined] + [""] * (bottom - top)
    return "".join("".join(lines).split())


def _stored_name(kernel: Kernel, key: TimesKey) -> str:
    source = key.unpacked_from if kernel is Kernel.UNPACK else kernel
    return "@".join(filter(None, (kernel.name.lower(), code_hash(source))))


# -- finding and keeping ---------------------------------------------------------------------
def find(key: TimesKey, wanted: Mapping[int, Collection[Kernel]]) -> tuple[Times, list[str]]:
    """Known times of every row count for which all ``wanted`` kernels are known.

    Returns:
        Rows of x -> kernel -> milliseconds, and where they come from: ``"cache"``, ``"shipped"``.
    """
    found: Times = {}
    sources: list[str] = []
    for source, stored in (
        ("cache", _user.get(_user_key(key))),
        ("shipped", _shipped().get(f"{key.device}|{key.text}", {})),
    ):
        for rows, kernels in wanted.items():
            own = stored.get(str(rows), {})
            if rows in found or not own:
                continue
            times = {
                kernel: own[name] for kernel in Kernel if (name := _stored_name(kernel, key)) in own
            }
            if all(kernel in times for kernel in kernels):
                found[rows] = times
                sources += [source] if source not in sources else []
            elif source == "shipped":
                _tell_stale(key.device)
    return found, sources


def keep(key: TimesKey, times: Mapping[int, Mapping[Kernel, float]]) -> None:
    """Remember measured times, here and for the next process."""
    if times:
        _user.put(_user_key(key), to_stored(key, times))


def to_stored(key: TimesKey, times: Mapping[int, Mapping[Kernel, float]]) -> Stored:
    """Times as files hold them: by rows of x, and by kernel with the hash of its code."""
    return {
        str(rows): {_stored_name(k, key): float(f"{ms:.4g}") for k, ms in own.items()}
        for rows, own in times.items()
    }


def set_cache_path(path: str | os.PathLike[str] | None) -> None:
    """Keep times in the file ``path`` from now on; None goes back to the user's cache folder."""
    _user.move(Path(path) if path is not None else None)


def clear_cache() -> None:
    """Forget every time that was measured, in memory and on disk."""
    _user.clear()


def _user_key(key: TimesKey) -> str:
    return f"{key.device}|torch {torch.__version__}|{key.text}"


class _UserCache:
    """Key -> times, in memory and in one JSON file that processes share.

    The file is replaced as a whole, so a reader never sees half of it. Two writers at the same
    moment may lose one entry, which is then measured again.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._entries: dict[str, Stored] = {}
        self._is_read = False

    @property
    def path(self) -> Path:
        """The file; its folder is made by the first write."""
        return self._path or Path(torch.hub.get_dir()).parent / "resu_compile" / "linear_times.json"

    def get(self, key: str) -> Stored:
        if not self._is_read:
            self._entries = _merged(self._read(), self._entries)
            self._is_read = True
        return self._entries.get(key, {})

    def put(self, key: str, stored: Stored) -> None:
        self._entries = _merged(self._entries, {key: stored})
        try:
            replace_file(self.path, to_text(_merged(self._read(), self._entries)))
        except OSError as error:
            logger.warning("%s: cannot keep measured times there: %s", self.path, error)

    def move(self, path: Path | None) -> None:
        with lock:
            self._path, self._entries, self._is_read = path, {}, False

    def clear(self) -> None:
        with lock:
            self._entries, self._is_read = {}, True
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s: cannot remove it: %s", self.path, error)

    def _read(self) -> dict[str, Stored]:
        try:
            return parse(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, no JSON, not ours
            logger.warning("%s: not usable, will be rebuilt: %s", self.path, error)
            return {}


_user = _UserCache()


def _merged(old: Mapping[str, Stored], fresh: Mapping[str, Stored]) -> dict[str, Stored]:
    """Entries of both; for one row count those of ``fresh``, so that times are of one run."""
    return dict(old) | {key: {**old.get(key, {}), **stored} for key, stored in fresh.items()}


# -- the shipped tables ----------------------------------------------------------------------
@functools.cache
def _shipped() -> dict[str, Stored]:
    """``device|key`` -> times of all tables that came with the package."""
    entries: dict[str, Stored] = {}
    for name in SHIPPED:
        path = DATA_FOLDER / name
        try:
            entries |= parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.warning("%s: not usable, shapes are measured instead: %s", path, error)
    return entries


@functools.cache
def _tell_stale(device: str) -> None:
    logger.info(
        "%s: shipped times exist, but of other code or without a kernel that this package has; "
        "they are measured instead",
        device,
    )


def to_text(entries: Mapping[str, Stored]) -> str:
    """A file of times, one entry a line."""
    head = json.dumps({"format": FORMAT, "version": VERSION})[:-1]
    lines = (f"{json.dumps(key)}: {json.dumps(own)}" for key, own in sorted(entries.items()))
    return f'{head}, "times_ms": {{\n' + ",\n".join(lines) + "\n}}\n"


def parse(text: str) -> dict[str, Stored]:
    """The entries of a file of times.

    Raises:
        ValueError: if it is no such file, or holds anything but finite times.
    """
    content: Any = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected a JSON object of format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION}, got {content.get('version')!r}")
    entries = content.get("times_ms")
    if not isinstance(entries, dict):
        raise ValueError(f"expected an object times_ms, got {type(entries).__name__}")
    for key, stored in entries.items():
        batches = stored.values() if isinstance(stored, dict) else [None]
        for own in batches:
            times = own.values() if isinstance(own, dict) else [None]
            if not all(isinstance(t, (int, float)) and math.isfinite(t) for t in times):
                raise ValueError(f"expected rows -> kernel -> milliseconds at {key!r}")
    return entries


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
