"""Frozen dataclasses as plain data and back, and such data in YAML and JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from resu_compile.errors import ArgumentError, ArgumentTypeError, check_known_keys

T = TypeVar("T")


def from_plain(kind: type[T], data: object, where: str) -> T:
    """An object of the dataclass ``kind`` from a mapping of its fields.

    Args:
        kind: a dataclass.
        data: field -> value.
        where: name of the place in the whole, for messages.

    Raises:
        ArgumentError: an unknown field, a missing one, or a value that it does not take.
        ArgumentTypeError: ``data`` is no mapping.
    """
    if not isinstance(data, Mapping):
        raise ArgumentTypeError(f"{where}: expected a mapping of settings, got {data!r}")
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    check_known_keys(data, known, what=f"setting of {where}")
    for name, entry in known.items():
        if entry.default is MISSING and entry.default_factory is MISSING and name not in data:
            raise ArgumentError(f"{where}.{name}: expected a value, got none")
    return kind(**data)


def to_plain(
    value: Any, data_classes: tuple[type[Any], ...], where: str = "", *, strict: bool = True
) -> Any:
    """``value`` as JSON data: dataclasses and mappings become dicts, tuples become lists.

    Args:
        value: a tree of these.
        data_classes: the dataclasses that are data; objects of other classes are not.
        where: name of the place in the whole, for messages.
        strict: raise for what is no data; False puts the name of its class or function there.

    Raises:
        ArgumentError: a function or an object, with ``strict``; the message names its place.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, data_classes):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, Mapping):
        prefix = f"{where}." if where else ""
        return {
            str(key): to_plain(item, data_classes, f"{prefix}{key}", strict=strict)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [to_plain(item, data_classes, where, strict=strict) for item in value]
    if not strict:
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    raise ArgumentError(
        f"{where}: expected plain data (a name, numbers) in a config that is saved, got {value!r}; "
        "pass functions and objects in Python, to the config that was loaded"
    )


# -- files -------------------------------------------------------------------------------------
def write_data(path: str | Path, data: Any) -> None:
    """Write plain data to a ``.yaml``, ``.yml`` or ``.json`` file."""
    if _format(path) == "JSON":
        text = json.dumps(data, indent=2) + "\n"
    else:
        text = _yaml().safe_dump(data, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def read_data(path: str | Path) -> Any:
    """The plain data in a ``.yaml``, ``.yml`` or ``.json`` file; an empty YAML file gives {}."""
    kind, text = _format(path), Path(path).read_text(encoding="utf-8")
    try:
        data = json.loads(text) if kind == "JSON" else _parse_yaml(text)
    except ValueError as error:
        raise ArgumentError(f"{path}: expected {kind}, got: {error}") from error
    return {} if data is None else data


def _format(path: str | Path) -> str:
    kind = {".yaml": "YAML", ".yml": "YAML", ".json": "JSON"}.get(Path(path).suffix.lower())
    if kind is None:
        raise ArgumentError(f"path: expected a name ending in .yaml, .yml or .json, got {path!s}")
    return kind


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ArgumentError(
            "path: expected PyYAML to be installed for a YAML file, it is not; "
            "pip install resu-compile[train], or use .json"
        ) from None
    return yaml


def _parse_yaml(text: str) -> Any:
    """Safe YAML in which ``1e-4`` is a number, as in YAML 1.2; PyYAML reads a string."""
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """A loader of its own: a resolver that is added stays added."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
