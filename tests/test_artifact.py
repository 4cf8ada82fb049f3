"""Files that must not load: damaged, foreign, newer, tampered with, or carrying pickles."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
from torch import nn

from resu_compile.errors import ArtifactError
from resu_compile.export import export_masked, load
from tests.test_export import masked


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 16)

    def forward(self, x):
        return self.fc(x)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    model, masks = masked(Net)
    folder = tmp_path_factory.mktemp("files")
    for mode in ("sparse", "dense"):
        export_masked(model, masks, (torch.randn(2, 32),), folder / f"{mode}.pt2", mode=mode)
    return folder


def rewrite(source, target, change=lambda _, data: data, extra=None):
    """Copy an archive entry by entry; ``change`` returns None to leave one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return target


def edit(entry, function):
    """A change that edits one JSON entry."""

    def change(name, data):
        if name != entry:
            return data
        content = json.loads(data)
        function(content)
        return json.dumps(content)

    return change


def edit_metadata(function):
    return edit("extra/resu_compile.json", function)


def refused(path, match):
    with pytest.raises(ArtifactError, match=match) as caught:
        load(path, sparse_threshold=1.0)
    assert str(path) in str(caught.value)


def test_rewriting_alone_changes_nothing(files, tmp_path):
    path = rewrite(files / "sparse.pt2", tmp_path / "m.pt2")
    x = torch.randn(2, 32)
    expected = load(files / "sparse.pt2", sparse_threshold=1.0)(x)
    assert torch.equal(load(path, sparse_threshold=1.0)(x), expected)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt2")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(files, tmp_path, share):
    data = (files / "sparse.pt2").read_bytes()
    path = tmp_path / "m.pt2"
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "expected a complete zip archive.*copy it again or export the model again")


def test_flipped_bit(files, tmp_path):
    data = bytearray((files / "sparse.pt2").read_bytes())
    with zipfile.ZipFile(files / "sparse.pt2") as archive:
        info = next(i for i in archive.infolist() if "data/weights/weight_0" in i.filename)
    name_length, extra_length = data[info.header_offset + 26], info.header_offset + 28
    start = info.header_offset + 30 + name_length
    start += int.from_bytes(data[extra_length : extra_length + 2], "little")
    data[start + 5] ^= 4
    path = tmp_path / "m.pt2"
    path.write_bytes(data)
    refused(path, "to match its checksum")


def test_foreign_files(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"not a zip at all")
    refused(path, "complete zip archive")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some/thing.txt", "hello")
    refused(path, "expected a file written by resu_compile.export")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path, "expected a file written by resu_compile.export")
    torch.export.save(torch.export.export(Net(), (torch.randn(2, 32),)), path)
    refused(path, "load a plain torch.export file with torch.export.load")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(format="other"), "expected format 'resu_compile'"),
        (lambda m: m.update(format_version=2), "newer resu_compile .*upgrade"),
        (lambda m: m.update(packed_weight_version=2), "packed_weight_version <= 1, got 2"),
        (lambda m: m.update(format_version="1"), "positive integer, got '1'"),
        (lambda m: m.update(format_version=True), "positive integer, got True"),
        (lambda m: m.pop("weights"), "metadata of version 1"),
        (lambda m: m.update(weights=[{"name": "x"}]), "metadata of version 1"),
        (lambda m: m.update(mode="int4"), "mode as one of sparse, dense"),
        (lambda m: m["weights"][0].update(shape=[16, 33]), r"fc.weight_bits of shape \[66\]"),
        (lambda m: m["weights"][0].update(shape=[-16, -32]), "nnz within its shape"),
        (lambda m: m["weights"][0].update(nnz=513), "nnz within its shape"),
        (lambda m: m["weights"][0].update(nnz=1), r"fc.weight_values of shape \[1\]"),
        (lambda m: m["weights"][0].update(dtype="float16"), "bytes, got"),
        (lambda m: m["weights"][0].update(dtype="int32"), "as torch.int32 of shape"),
        (lambda m: m["weights"][0].update(dtype="load"), "a torch dtype, got 'load'"),
        (lambda m: m["weights"][0].update(values="fc.bias"), r"fc.bias of shape \[1\d\d\]"),
        (lambda m: m["weights"][0].update(values=3), "a record of a weight"),
        (lambda m: m["weights"][0].update(name="other"), None),
    ],
)
def test_changed_metadata(files, tmp_path, change, match):
    path = rewrite(files / "sparse.pt2", tmp_path / "m.pt2", edit_metadata(change))
    if match is None:  # a name is only a label
        assert load(path, sparse_threshold=1.0).get_parameter("other").shape == (16, 32)
    else:
        refused(path, match)


def test_metadata_that_is_no_json(files, tmp_path):
    def change(name, data):
        return b"{" if name == "extra/resu_compile.json" else data

    refused(rewrite(files / "sparse.pt2", tmp_path / "m.pt2", change), "expected JSON in")


def test_shapes_of_the_tensors(files, tmp_path):
    def change(content):
        content["config"]["fc.weight_bits"]["tensor_meta"]["sizes"] = [{"as_int": 63}]

    path = tmp_path / "m.pt2"
    rewrite(files / "sparse.pt2", path, edit("data/weights/model_weights_config.json", change))
    refused(path, r"fc.weight_bits of shape \[64\], got \[63\]")


def entry_of(path, tensor):
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        config = json.loads(archive.read(f"{root}/data/weights/model_weights_config.json"))
    return "data/weights/" + config["config"][tensor]["path_name"]


def test_bytes_behind_the_tensors(files, tmp_path):
    bits = entry_of(files / "sparse.pt2", "fc.weight_bits")
    path = tmp_path / "m.pt2"
    rewrite(files / "sparse.pt2", path, lambda n, d: d + b"\0" if n == bits else d)
    refused(path, "fc.weight_bits of 64 bytes, got 65")
    rewrite(files / "sparse.pt2", path, lambda n, d: None if n == bits else d)
    refused(path, "expected the entry data/weights/weight_")
    rewrite(files / "sparse.pt2", path, lambda n, d: b"\xff" * 64 if n == bits else d)
    refused(path, "expected bitmaps that fit their values")


def test_graph_that_torch_cannot_read(files, tmp_path):
    path = tmp_path / "m.pt2"
    rewrite(files / "sparse.pt2", path, lambda n, d: b"{}" if n == "models/model.json" else d)
    refused(path, "could not read this file")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_refused_unread(files, tmp_path):
    path, trap = tmp_path / "m.pt2", tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save((Evil(trap),), buffer)
    rewrite(
        files / "sparse.pt2",
        path,
        lambda n, d: buffer.getvalue() if n == "data/sample_inputs/model.pt" else d,
    )
    refused(path, "sample inputs other than plain tensors")

    def pickled(content):
        content["config"]["fc.bias"]["use_pickle"] = True

    rewrite(files / "dense.pt2", path, edit("data/weights/model_weights_config.json", pickled))
    refused(path, "the pickled tensor 'fc.bias'")
    with zipfile.ZipFile(files / "dense.pt2") as archive:
        root = archive.namelist()[0].partition("/")[0]
    for entry in (
        "data/weights/model.pt",
        "data/constants/custom_obj_0",
        "data/aotinductor/model/model.so",
        "models/other.json",
    ):
        rewrite(files / "dense.pt2", path, extra={f"{root}/{entry}": buffer.getvalue()})
        refused(path, f"the entry '{root}/{entry}', which loading would unpickle or execute")
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_appear_twice(files, tmp_path):
    with zipfile.ZipFile(files / "dense.pt2") as archive:
        names = archive.namelist()
    model = next(name for name in names if name.endswith("models/model.json"))
    path = rewrite(files / "dense.pt2", tmp_path / "m.pt2", extra={model: b"{}"})
    refused(path, "each entry once")
    path = rewrite(files / "dense.pt2", tmp_path / "m.pt2", extra={"other/x": b""})
    refused(path, "expected a file written by resu_compile.export")


def test_needs_of_a_file(files, tmp_path):
    path = tmp_path / "m.pt2"
    change = edit_metadata(lambda m: m.update(modules=["not_imported.types"]))
    rewrite(files / "dense.pt2", path, change)
    refused(path, "run `import not_imported.types` and load again")
    if not torch.cuda.is_available():
        change = edit_metadata(lambda m: m.update(device="cuda:0"))
        rewrite(files / "dense.pt2", path, change)
        refused(path, 'a machine with cuda.*export it in mode "sparse"')
