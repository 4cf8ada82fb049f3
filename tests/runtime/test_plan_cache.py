"""Known times: what they belong to, the user's file, the shipped tables, the code they were of."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from resu_compile.kernels.plan import BUCKET_ROWS, Kernel
from resu_compile.runtime import plan_cache
from resu_compile.runtime.plan_cache import TimesKey, find, keep, strip_comments

CPU = torch.device("cpu")
DENSE, CSR, ROWS, TILES, UNPACK, SEMI = Kernel
TIMES = {1: {DENSE: 1.0, CSR: 0.5}, 8: {DENSE: 2.0, CSR: 3.0}}  # by rows of x
WANTED = {1: {DENSE, CSR}, 8: {DENSE, CSR}}


@pytest.fixture(autouse=True)
def cache_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "times.json"
    plan_cache.set_cache_path(path)
    monkeypatch.setattr(plan_cache, "DATA_FOLDER", tmp_path / "data")
    plan_cache._shipped.cache_clear()
    plan_cache._tell_stale.cache_clear()
    yield path
    plan_cache.set_cache_path(None)
    plan_cache._shipped.cache_clear()


def key_of(shape=(64, 96), sparsity=0.7, dtype=torch.float32, pattern=None, device=CPU):
    return TimesKey.of(device, *shape, sparsity, dtype, cuda_graphs=True, pattern=pattern)


# -- keys ------------------------------------------------------------------------------------
def test_what_a_key_holds(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    key = key_of(pattern=(2, 4))
    assert key.text == "calls|float32|64x96|0.70 2:4"  # no graphs on the CPU
    assert key.device.endswith(", 97 threads")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    key = key_of(device=torch.device("cuda", 1))
    assert (key.device, key.launch) == ("NVIDIA H200", "graph")


def test_sparsity_counts_to_hundredths():
    assert key_of(sparsity=0.7049) == key_of(sparsity=0.7) != key_of(sparsity=0.71)
    assert key_of(sparsity=1.0) == key_of(sparsity=0.99)


@pytest.mark.parametrize(
    "other", [{"shape": (96, 64)}, {"dtype": torch.float64}, {"pattern": (2, 4)}], ids=str
)
def test_times_of_another_key_do_not_count(other):
    keep(key_of(), TIMES)
    assert find(key_of(), WANTED) == (TIMES, ["cache"])
    assert find(key_of(**other), WANTED) == ({}, [])


# -- the user's file -------------------------------------------------------------------------
def test_kept_on_disk(cache_file):
    keep(key_of(), TIMES)
    plan_cache.set_cache_path(cache_file)  # as the next process: nothing in memory
    assert find(key_of(), WANTED) == (TIMES, ["cache"])
    assert [p.name for p in cache_file.parent.iterdir()] == [cache_file.name]  # no temporary left
    (entry,) = json.loads(cache_file.read_text())["times_ms"].values()
    assert entry["8"] == {"dense": 2.0, f"csr@{plan_cache.code_hash(CSR)}": 3.0}


def test_a_row_count_is_found_only_with_all_its_kernels():
    keep(key_of(), TIMES)
    assert find(key_of(), {1: {DENSE}, 8: {DENSE, CSR, UNPACK}, 16: {DENSE}})[0] == {1: TIMES[1]}
    keep(key_of(), {8: {DENSE: 4.0, UNPACK: 5.0}, 16: {DENSE: 6.0}})
    found, _ = find(key_of(), {1: {DENSE}, 8: {UNPACK}, 16: {DENSE}})
    # a row count is replaced as a whole: only times of one run are compared
    assert found == {1: TIMES[1], 8: {DENSE: 4.0, UNPACK: 5.0}, 16: {DENSE: 6.0}}


def test_times_of_other_code_or_another_torch_do_not_count(monkeypatch):
    keep(key_of(), TIMES)
    with monkeypatch.context() as patched:
        patched.setattr(plan_cache, "code_hash", lambda k: "" if k is DENSE else "01234567")
        assert find(key_of(), WANTED) == ({}, [])
        assert find(key_of(), {1: {DENSE}})[0] == {1: {DENSE: 1.0}}
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert find(key_of(), WANTED) == ({}, [])


def test_two_processes_keep_both_entries(cache_file):
    other = plan_cache._UserCache()
    other.move(cache_file)
    keep(key_of(), TIMES)  # this process has read the file before the other writes
    other.put("theirs", {"1": {"dense": 3.0}})
    keep(key_of(), {16: {DENSE: 1.0}})
    plan_cache.set_cache_path(cache_file)
    assert find(key_of(), WANTED | {16: {DENSE}})[0] == TIMES | {16: {DENSE: 1.0}}
    assert json.loads(cache_file.read_text())["times_ms"]["theirs"] == {"1": {"dense": 3.0}}


def file_of(times):
    return json.dumps(
        {"format": plan_cache.FORMAT, "version": plan_cache.VERSION, "times_ms": times}
    )


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"",
        b'{"format": "resu_compile linear ti',
        b"[1, 2]",
        b'{"a": 1}',
        file_of({}).replace(f'"version": {plan_cache.VERSION}', '"version": 99').encode(),
        file_of([]).encode(),
        file_of({"k": [1]}).encode(),
        file_of({"k": {"1": 2}}).encode(),
        file_of({"k": {"1": {"dense": "fast"}}}).encode(),
        file_of({"k": {"1": {"dense": float("nan")}}}).encode(),
    ],
)
def test_a_corrupt_or_foreign_file_is_rebuilt(content, cache_file, caplog):
    cache_file.parent.mkdir()
    cache_file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert find(key_of(), WANTED) == ({}, [])
    assert f"{cache_file}: not usable, will be rebuilt" in caplog.text
    keep(key_of(), TIMES)
    plan_cache.set_cache_path(cache_file)
    assert find(key_of(), WANTED)[0] == TIMES


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    plan_cache.set_cache_path(tmp_path / "file" / "times.json")
    keep(key_of(), TIMES)
    assert find(key_of(), WANTED)[0] == TIMES
    assert "cannot keep measured times there" in caplog.text


def test_clear_cache(cache_file):
    keep(key_of(), TIMES)
    plan_cache.clear_cache()
    assert not cache_file.exists()
    assert find(key_of(), WANTED) == ({}, [])


def test_default_path_is_the_users_cache():
    plan_cache.set_cache_path(None)
    assert plan_cache._user.path.parts[-2:] == ("resu_compile", "linear_times.json")


# -- the shipped tables ----------------------------------------------------------------------
@pytest.fixture
def ship(tmp_path):
    """Ships a table; None ships a damaged one."""

    def ship(times):
        (tmp_path / "data").mkdir()
        text = "{" if times is None else file_of(times)
        (tmp_path / "data" / plan_cache.SHIPPED[0]).write_text(text)

    return ship


def test_shipped_times_stand_in_for_what_the_cache_lacks(ship):
    key = key_of()
    ship({f"{key.device}|{key.text}": plan_cache.to_stored(key, TIMES)})
    keep(key, {1: {DENSE: 7.0, CSR: 8.0}})
    found, sources = find(key, WANTED)
    assert found == {1: {DENSE: 7.0, CSR: 8.0}, 8: TIMES[8]}
    assert sources == ["cache", "shipped"]


def test_shipped_times_of_another_device_or_other_code_do_not_count(ship, monkeypatch, caplog):
    key = key_of()
    stored = plan_cache.to_stored(key, TIMES)
    ship({f"{key.device}|{key.text}": stored, f"NVIDIA H100|{key_of((8, 8)).text}": stored})
    assert find(key_of((8, 8)), WANTED) == ({}, [])
    monkeypatch.setattr(plan_cache, "code_hash", lambda k: "" if k is DENSE else "01234567")
    with caplog.at_level(logging.INFO):
        assert find(key, WANTED) == ({}, [])
        find(key, WANTED)
    assert caplog.text.count("shipped times exist, but of other code") == 1


def test_a_damaged_table_is_left_aside(ship, caplog):
    ship(None)
    assert find(key_of(), WANTED) == ({}, [])
    assert "not usable, shapes are measured instead" in caplog.text


TABLES = sorted((plan_cache.KERNEL_FOLDER.parent / "data").glob("plans_*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_tables_of_the_package_can_be_read(path):
    assert path.name in plan_cache.SHIPPED
    entries = plan_cache.parse(path.read_text())
    assert entries
    for key, stored in entries.items():
        device, launch, dtype, shape, sparsity = key.split("|")
        n, k = map(int, shape.split("x"))
        share = float(sparsity.split()[0])
        rebuilt = TimesKey(device, launch, dtype, (n, k), share, sparsity.partition(" ")[2])
        assert f"{device}|{rebuilt.text}" == key
        assert stored.keys() <= set(map(str, BUCKET_ROWS))
        assert all("dense" in own and min(own.values()) > 0 for own in stored.values())


# -- the code that was timed -----------------------------------------------------------------
def test_each_kernel_has_a_hash_of_its_own_code():
    hashes = [plan_cache.code_hash(kernel) for kernel in (DENSE, CSR, ROWS, TILES, SEMI)]
    assert hashes[0] == ""
    assert len(set(hashes)) == 5
    assert all(len(digits) == 8 for digits in hashes[1:])


def test_unpacking_counts_with_the_code_of_its_format():
    key = key_of()
    keep(key, {1: {UNPACK: 1.0}})
    (own,) = plan_cache._user.get(plan_cache._user_key(key)).values()
    assert own == {f"unpack@{plan_cache.code_hash(CSR)}": 1.0}


def test_comments_and_docstrings_are_no_code():
    plain = "def f(x):\n    y = '# text'\n    return g(x,\n'''a''')\n"
    spoken = (
        '"""Module."""\n# why\ndef f(x):\n    r"""What.\n\n    More.\n    """\n'
        "    y = '# text'  # trailing\n    return g(x,\n'''a''')  # end\n"
    )
    assert strip_comments(spoken, ".py") == strip_comments(plain, ".py")
    assert "'#text'" in strip_comments(plain, ".py")
    assert strip_comments(plain, ".py") != strip_comments(plain.replace("g(", "h("), ".py")
    cuda = "int a; // one\n/* two\n three */ int b;"
    assert strip_comments(cuda, ".cu") == "inta;intb;"
