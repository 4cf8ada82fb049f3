"""The results file: JSON lines, one a finished cell, which several processes append to.

A line is written at once, under a lock, and flushed to the disk. A line that a kill cut short is
removed by the next one to write, and passed over by all who read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from resu_compile.errors import ArgumentError
from resu_compile.training.stats import finite

FORMAT = "resu_compile.experiment"
FORMAT_VERSION = 1
Record = dict[str, Any]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes] | None]:
    """``path``, open for reading and appending, while no other process has it locked.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        path: made if it is not there, with its folder.
        wait: False gives None at once if another process has the lock.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise ArgumentError(
            "experiment: expected an operating system with file locks (fcntl), got none; "
            "run it on Linux, macOS or in WSL"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line; NaN and infinity, which JSON has not, become None."""
    full = {"format": FORMAT, "format_version": FORMAT_VERSION, **finite(record)}
    line = (json.dumps(full, allow_nan=False) + "\n").encode()
    with locked(path) as file:
        assert file is not None
        end = file.seek(0, os.SEEK_END)
        if end and not _ends_whole(file, end):
            file.truncate(_last_line_end(file))
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _ends_whole(file: IO[bytes], end: int) -> bool:
    file.seek(end - 1)
    return file.read(1) == b"\n"


def _last_line_end(file: IO[bytes]) -> int:
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def read_records(path: str | Path) -> list[Record]:
    """The records of a results file, in order; none if there is no such file.

    Raises:
        ArgumentError: a line is no record of an experiment, or one of another format version.
    """
    return ResultsFile(path).read()


class ResultsFile:
    """Reads a results file again and again, and each line of it once.

    Args:
        path: of the file, which need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._offset = 0
        self._records: list[Record] = []

    def read(self) -> list[Record]:
        """The records, in order.

        Raises:
            ArgumentError: as ``read_records``.
        """
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._offset:  # it was put away, and another begun
            self._offset, self._records = 0, []
        if size > self._offset:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # a kill may have left half a line
            first = len(self._records) + 1
            found = [self._record(*item) for item in enumerate(whole.split(b"\n")[:-1], first)]
            self._records += found
            self._offset += len(whole)
        return list(self._records)

    def _record(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ArgumentError(
                f"{self._path}: expected a record of an experiment in line {number}, got "
                f"{line[:40]!r}; take this line out, and what it held runs again"
            )
        if record.get("format_version") != FORMAT_VERSION:
            raise ArgumentError(
                f"{self._path}: expected format version {FORMAT_VERSION} in line {number}, got "
                f"{record.get('format_version')!r}; read it with the release that wrote it"
            )
        return record


def by_key(records: Iterable[Record]) -> dict[str, Record]:
    """The records by the key of their cell; of several the last one that succeeded."""
    found: dict[str, Record] = {}
    for record in records:
        before = found.get(record["key"])
        if before is None or record["status"] == "done" or before["status"] != "done":
            found[record["key"]] = record
    return found
