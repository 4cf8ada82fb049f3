"""The ``.pt2`` artifact: its metadata, and the checks that a file passes before it is loaded.

``docs/export.md`` describes the format. An artifact is what ``torch.export.save`` writes, plus one
JSON entry, ``extra/resu_compile.json``, and minus everything that would have to be unpickled or
executed: tensor subclasses, custom objects, compiled libraries.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import posixpath
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import torch
from torch import Tensor

from resu_compile.errors import ArtifactError
from resu_compile.kernels._triton import cdiv
from resu_compile.kernels.packed_weight import PACKED_WEIGHT_VERSION

FORMAT = "resu_compile"
FORMAT_VERSION = 1
METADATA_ENTRY = "resu_compile.json"
MODES = ("sparse", "dense")

_WEIGHTS_CONFIG = "data/weights/model_weights_config.json"
_CONSTANTS_CONFIG = "data/constants/model_constants_config.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
# Everything else that torch.export.load would accept is unpickled or loaded as native code.
_PLAIN_ENTRIES = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/resu_compile\.json"
    r"|archive_format|archive_version|byteorder|\.data/\w+"
)


@dataclass(frozen=True)
class WeightRecord:
    """One masked weight of an artifact.

    Attributes:
        name: parameter name in the exported model.
        shape: shape of the dense weight.
        dtype: torch dtype without its prefix, ``"float32"``.
        nnz: number of active entries.
        packed: stored as values and bits; False: stored dense.
        values: name of the values tensor, ``""`` unless packed.
        bits: name of the bits tensor, ``""`` unless packed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    packed: bool
    values: str = ""
    bits: str = ""

    @property
    def numel(self) -> int:
        """Number of entries, active and pruned."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Metadata:
    """What ``extra/resu_compile.json`` says.

    Attributes:
        mode: ``"sparse"`` or ``"dense"``.
        weights: the masked weights.
        device: the device that the tensors are stored for, ``"cpu"`` in a sparse file.
        torch_version: of the torch that wrote the file.
        package_version: of the resu_compile that wrote the file.
        modules: Python modules that define the model's own input and output types, which must be
            imported before the file is loaded.
    """

    mode: str
    weights: tuple[WeightRecord, ...]
    device: str
    torch_version: str
    package_version: str
    modules: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """The text of the entry."""
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "packed_weight_version": PACKED_WEIGHT_VERSION,
        }
        return json.dumps(head | asdict(self), indent=1)


def check_artifact(file: IO[bytes], path: str) -> Metadata:
    """Read the metadata of an artifact and check that the rest of the file fits it.

    Reads the whole file once, for the checksums. Unpickles nothing but the sample inputs, and
    those with ``weights_only=True``.

    Args:
        file: the artifact, open for reading.
        path: its name, for errors.

    Raises:
        ArtifactError: the file is damaged, was not written by ``resu_compile.export``, is of a
            newer format, or holds something that would have to be unpickled or executed.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _check_archive(archive, path)
    except zipfile.BadZipFile as error:
        raise _damaged(path, f"a complete zip archive, got one that is not ({error})") from error


def check_weights(path: str, metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """Check the packed tensors that were loaded from ``path`` against the metadata.

    Raises:
        ArtifactError: one is missing or has another shape or dtype than the metadata says.
    """
    for weight in metadata.weights:
        if not weight.packed:
            continue
        for name, shape, dtype in (
            (weight.values, (weight.nnz,), weight.torch_dtype),
            (weight.bits, (cdiv(weight.numel, 8),), torch.uint8),
        ):
            found = tensors.get(name)
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                got = "none" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
                raise _damaged(path, f"{name} as {dtype} of shape {shape}, got {got}")


# -- checks ----------------------------------------------------------------------------------
def _check_archive(archive: zipfile.ZipFile, path: str) -> Metadata:
    names = archive.namelist()
    if names and min(info.header_offset for info in archive.infolist()) != 0:
        # a file cut short may end in an archive that one of its entries holds
        raise _damaged(path, "a complete zip archive, got the end of another one in it")
    roots = {name.partition("/")[0] for name in names}
    root = min(roots, default="")
    if len(roots) != 1 or f"{root}/extra/{METADATA_ENTRY}" not in names:
        raise ArtifactError(
            f"{path}: expected a file written by resu_compile.export, found no "
            f"extra/{METADATA_ENTRY} in it; load a plain torch.export file with torch.export.load, "
            "or export the model again"
        )
    metadata = _read_metadata(archive, f"{root}/extra/{METADATA_ENTRY}", path)
    try:
        broken = archive.testzip()
    except (zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, f"readable entries, got: {error}") from error
    if broken is not None:
        raise _damaged(path, f"entry {broken} to match its checksum, it does not")
    if len(set(names)) != len(names):
        raise _damaged(path, "each entry once, got one twice")
    for name in names:
        if not _PLAIN_ENTRIES.fullmatch(name.partition("/")[2]):
            raise _refused(path, f"the entry {name!r}")
    payload: dict[str, tuple[str, list[int]]] = {}
    for config in (_WEIGHTS_CONFIG, _CONSTANTS_CONFIG):
        payload |= _read_payload(archive, root, config, path)
    for weight in metadata.weights:
        _check_record(archive, root, weight, payload, path)
    try:
        torch.load(io.BytesIO(_read(archive, f"{root}/{_SAMPLE_INPUTS}", path)), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise _refused(path, "sample inputs other than plain tensors and containers") from error
    return metadata


def _read_metadata(archive: zipfile.ZipFile, entry: str, path: str) -> Metadata:
    data = _read_json(archive, entry, path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: expected format {FORMAT!r} in extra/{METADATA_ENTRY}, got another; the file "
            "was not written by resu_compile.export"
        )
    for key, newest in (
        ("format_version", FORMAT_VERSION),
        ("packed_weight_version", PACKED_WEIGHT_VERSION),
    ):
        version = data.get(key)
        if type(version) is not int or version < 1:
            raise _damaged(path, f"{key} as a positive integer, got {version!r}")
        if version > newest:
            raise ArtifactError(
                f"{path}: expected {key} <= {newest}, got {version}; the file was written by a "
                f"newer resu_compile ({data.get('package_version')}), upgrade to load it"
            )
    try:
        metadata = Metadata(
            mode=str(data["mode"]),
            weights=tuple(
                WeightRecord(**{**weight, "shape": tuple(weight["shape"])})
                for weight in data["weights"]
            ),
            device=str(data["device"]),
            torch_version=str(data["torch_version"]),
            package_version=str(data["package_version"]),
            modules=tuple(str(module) for module in data["modules"]),
        )
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"metadata of version {FORMAT_VERSION}, got: {error!r}") from error
    if metadata.mode not in MODES:
        raise _damaged(path, f"mode as one of {', '.join(MODES)}, got {metadata.mode!r}")
    return metadata


def _read_payload(
    archive: zipfile.ZipFile, root: str, config: str, path: str
) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (its entry, its sizes); refuses pickled tensors."""
    data = _read_json(archive, f"{root}/{config}", path)
    found = {}
    try:
        for name, item in data["config"].items():
            if item["use_pickle"] is not False:
                raise _refused(path, f"the pickled tensor {name!r}")
            sizes = [size["as_int"] for size in item["tensor_meta"]["sizes"]]
            found[name] = (f"{posixpath.dirname(config)}/{item['path_name']}", sizes)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"the tensor table of torch.export, got: {error!r}") from error
    return found


def _check_record(
    archive: zipfile.ZipFile,
    root: str,
    weight: WeightRecord,
    payload: dict[str, tuple[str, list[int]]],
    path: str,
) -> None:
    """Types, shapes, and the bytes behind them, of one weight."""
    texts = (weight.name, weight.dtype, weight.values, weight.bits)
    if not all(isinstance(text, str) for text in texts) or type(weight.packed) is not bool:
        raise _damaged(path, f"a record of a weight, got {weight}")
    sizes = (*weight.shape, weight.nnz)
    if any(type(size) is not int or size < 0 for size in sizes) or weight.nnz > weight.numel:
        raise _damaged(path, f"{weight.name}: nnz within its shape, got {weight}")
    if not isinstance(getattr(torch, weight.dtype, None), torch.dtype):
        raise _damaged(path, f"{weight.name}: a torch dtype, got {weight.dtype!r}")
    if not weight.packed:
        return
    for name, numel, itemsize in (
        (weight.values, weight.nnz, weight.torch_dtype.itemsize),
        (weight.bits, cdiv(weight.numel, 8), 1),
    ):
        entry, found = payload.get(name, ("", []))
        if found != [numel]:
            raise _damaged(path, f"{name} of shape [{numel}], got {found}")
        try:
            size = archive.getinfo(f"{root}/{entry}").file_size
        except KeyError as error:
            raise _damaged(path, f"the entry {entry}, found none") from error
        if size != numel * itemsize:
            raise _damaged(path, f"{name} of {numel * itemsize} bytes, got {size}")


def _read(archive: zipfile.ZipFile, entry: str, path: str) -> bytes:
    try:
        return archive.read(entry)
    except KeyError as error:
        raise _damaged(path, f"the entry {entry}, found none") from error


def _read_json(archive: zipfile.ZipFile, entry: str, path: str) -> Any:
    try:
        return json.loads(_read(archive, entry, path))
    except ValueError as error:
        raise _damaged(path, f"JSON in {entry}, got: {error}") from error


def _damaged(path: str, wanted: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: expected {wanted}; the file is damaged or was changed, copy it again or export "
        "the model again"
    )


def _refused(path: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: expected plain tensors, a graph and metadata, got {what}, which loading would "
        "unpickle or execute; resu_compile.export writes no such file, do not load it"
    )
