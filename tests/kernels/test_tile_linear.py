"""The product with packed tiles: against float64, and how launches are cut."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resu_compile.errors import ArgumentError
from resu_compile.kernels._nvrtc import FOLDER
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.tile_linear import (
    FILES,
    SHARED_BYTES,
    TILE_ROWS,
    TileConfig,
    TileShape,
    _Args,
    runs_on_tensor_cores,
    tile_config,
    tile_linear,
    tile_linear_cuda,
    tile_linear_reference,
    tile_rows,
)
from resu_compile.kernels.tile_weight import TileWeight, pack_tiles, unpack_tiles
from tests.tolerances import matmul_tolerance

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
TIMES = json.loads((Path(__file__).parent / "tile_times.json").read_text())["times"]


def make(rows, shape, dtype, device, sparsity=0.7):
    out_features, in_features = shape
    weight = torch.randn(shape, device=device)
    weight = (weight * (torch.rand(shape, device=device) >= sparsity)).to(dtype)
    x = torch.randn(rows, in_features, device=device).to(dtype)
    return x, weight, torch.randn(out_features, device=device).to(dtype)


def exact(x, weight, bias, activation="none"):
    """The result in float64, rounded once."""
    y = x.double() @ weight.double().t()
    y = y if bias is None else y + bias.double()
    return apply_activation(y, activation).to(x.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", [tile_linear, tile_linear_reference], ids=["op", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_dense_product(impl, dtype, activation, device):
    x, weight, bias = make(5, (70, 520), dtype, device)
    y = impl(x, pack_tiles(weight), bias, activation)
    expected = exact(x, weight, bias, activation)
    tolerance = matmul_tolerance(dtype, 520)
    # the dense product of the portable path rounds before the activation as well
    tolerance["rtol"] *= 2 if activation == "none" else 4
    tolerance["atol"] = max(tolerance["atol"], 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y, expected, **tolerance)


def test_values_are_rounded_to_the_dtype_of_x(device):
    x, weight, bias = make(3, (33, 300), torch.bfloat16, device)
    wide = weight.float() * 1.001
    y = tile_linear(x, pack_tiles(wide), bias.float())
    expected = tile_linear(x, pack_tiles(wide.to(torch.bfloat16)), bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_no_rows(device):
    x, weight, _ = make(0, (33, 300), torch.bfloat16, device)
    assert tile_linear(x, pack_tiles(weight), None).shape == (0, 33)


@pytest.mark.parametrize(
    ("x", "activation", "match"),
    [
        (torch.ones(2, 5), "none", r"x: expected a floating point matrix \(M, 4\)"),
        (torch.ones(4), "none", r"got torch.float32 of shape \(4,\)"),
        (torch.ones(2, 4, dtype=torch.int32), "none", "got torch.int32"),
        (torch.ones(2, 4, device="meta"), "none", "x: expected device cpu, got meta"),
        (torch.ones(2, 4), "tanh", "activation: expected one of"),
    ],
)
def test_bad_arguments(x, activation, match):
    with pytest.raises(ArgumentError, match=match):
        tile_linear(x, pack_tiles(torch.ones(3, 4)), None, activation)


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ArgumentError, match=r"bias: expected shape \(3,\), got \(4,\)"):
        tile_linear(torch.ones(2, 4), pack_tiles(torch.ones(3, 4)), torch.ones(4))


# -- cuts ------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(
    tile_m=st.sampled_from(TILE_ROWS),
    out_features=st.integers(1, 100_000),
    segments=st.integers(1, 200),
    unit=st.sampled_from((1, 2)),
    segment_rows=st.integers(0, 64),
)
def test_a_cut_fits_the_device(tile_m, out_features, segments, unit, segment_rows):
    shape = TileShape(out_features, segments, unit, 256, segment_rows)
    config = tile_config(tile_m, shape)
    assert config is not None
    assert config.shared_bytes(shape) <= SHARED_BYTES
    assert 1 <= config.held_segments(shape) <= config.own_segments(shape)
    assert config.splits <= segments  # no block of a cluster is without columns
    assert config.groups * 128 <= 1024


@pytest.mark.parametrize(
    "case", TIMES, ids=lambda c: "{out_features}x{in_features}-{sparsity}-{rows}".format(**c)
)
def test_the_cut_is_the_fastest_of_those_measured(case):
    segments = -(-case["in_features"] // 256)
    shape = TileShape(case["out_features"], segments, case["unit"], 256, case["segment_rows"])
    config = tile_config(tile_rows(case["rows"]), shape)
    name = f"{config.groups},{config.splits},{config.slots},{config.sums}"
    assert case["us"][name] <= 1.05 * min(case["us"].values())


@pytest.mark.parametrize(("segments", "splits"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4)])
def test_no_more_blocks_in_a_cluster_than_segments(segments, splits):
    for tile_m in TILE_ROWS:
        assert tile_config(tile_m, TileShape(512, segments, 1, 256, 40)).splits == splits


def test_a_segment_that_does_not_fit_has_no_cut():
    assert tile_config(64, TileShape(64, 1, 1, 8192, 2048)) is None


def test_all_columns_of_x_stay_where_they_can():
    shape = TileShape(14336, 16, 1, 256, 37)
    config = tile_config(8, shape)
    assert config.held_segments(shape) == config.own_segments(shape)
    assert config.slots >= 2


def test_rows_of_a_block():
    rows = [1, 8, 9, 16, 17, 32, 33, 64, 65, 1000]
    assert [tile_rows(n) for n in rows] == [8, 8, 16, 16, 32, 32, 64, 64, 64, 64]


def test_arguments_are_those_of_the_source():
    source = (FOLDER / "tile_linear.cu").read_text()
    body = re.search(r"struct Args \{(.*?)\n\};", source, re.DOTALL).group(1)
    declarations = re.sub(r"//.*", "", body).split(";")
    names = [
        re.sub(r"\[.*\]", "", name).strip(" *\n")
        for line in declarations
        if line.strip()
        for name in re.sub(r"^\s*(const )?\w+ ", "", line).split(",")
    ]
    assert names == [name for name, _ in _Args._fields_]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA compiler")
@pytest.mark.parametrize("unit", [1, 2])
def test_source_compiles_without_spills_or_waits(unit, tmp_path):
    source = tmp_path / "tiles.cu"
    source.write_text("".join((FOLDER / name).read_text() for name in FILES))
    defines = {"TILE_M": 16, "GROUPS": 4, "SPLITS": 4, "SLOTS": 2, "SUMS": 2}
    defines |= {"UNIT": unit, "SEGMENT": 256, "KIND": 1}
    done = subprocess.run(
        ["nvcc", "-cubin", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
        + [f"-D{name}={value}" for name, value in defines.items()]
        + ["-o", str(tmp_path / "tiles.cubin"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    assert "Potential Performance Loss" not in done.stderr  # ptxas waits after each wgmma


# -- the kernel ------------------------------------------------------------------------------
# Two segments, so that all tests share what is compiled: a second or so for each cut, unit, dtype.
@pytest.mark.cuda
@hopper
@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "unit"),
    [
        (3, (130, 511), torch.bfloat16, 1),
        (16, (130, 511), torch.bfloat16, 1),
        (25, (130, 511), torch.bfloat16, 1),
        (130, (130, 511), torch.bfloat16, 1),
        (8, (61, 511), torch.bfloat16, 2),
        (7, (61, 511), torch.float16, 1),
        (3, (1, 1), torch.bfloat16, 1),
    ],
    ids=str,
)
def test_kernel_is_the_dense_product(rows, shape, dtype, unit, device):
    x, weight, bias = make(rows, shape, dtype, device)
    packed = pack_tiles(weight, unit=unit)
    config = tile_config(tile_rows(rows), TileShape.of(packed))
    for overlap in (False, True):
        room = torch.full((rows + 2, shape[0]), torch.nan, dtype=dtype, device=device)
        y = tile_linear_cuda(x, packed, bias, "none", config, room[1:-1], overlap=overlap)
        assert room[[0, -1]].isnan().all()  # nothing is written before or behind
        torch.testing.assert_close(y, exact(x, weight, bias), **matmul_tolerance(dtype, shape[1]))


@pytest.mark.cuda
@hopper
def test_kernel_reads_what_the_kernel_before_it_wrote(device):
    shape, steps = (512, 512), 20
    x, weight, _ = make(3, shape, torch.bfloat16, device)
    mask = weight != 0
    weight /= 240  # so that sums of 512 stay about 1
    packed = pack_tiles(weight, mask)
    packs = [pack_tiles(weight * (i + 1), mask) for i in range(steps)]
    assert runs_on_tensor_cores(x)
    tile_linear(x, packed, None)  # compiled
    results = []
    for other in packs:  # refreshed in place, straight before it is read
        packed.val.copy_(other.val)
        results.append(tile_linear(x, packed, None))
        results.append(tile_linear(results[-1], packed, None))
    for i in range(steps):
        own = unpack_tiles(packs[i])
        y, z = results[2 * i : 2 * i + 2]
        torch.testing.assert_close(y, exact(x, own, None), **matmul_tolerance(x.dtype, 512))
        torch.testing.assert_close(z, exact(y, own, None), **matmul_tolerance(x.dtype, 512))


@pytest.mark.cuda
@hopper
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_applies_the_activation_before_rounding(activation, device):
    x, weight, bias = make(7, (130, 512), torch.bfloat16, device)
    y = tile_linear(x, pack_tiles(weight), bias, activation)
    expected = exact(x, weight, bias, activation)
    tolerance = matmul_tolerance(torch.bfloat16, 512)
    torch.testing.assert_close(y, expected, **tolerance)


@pytest.mark.cuda
@hopper
@pytest.mark.parametrize(
    "config",
    [
        TileConfig(8, 4, 8, 2, 2),
        TileConfig(32, 2, 4, 1, 1),
        TileConfig(64, 2, 8, 3, 2),
    ],
    ids=str,
)
def test_kernel_gives_the_same_for_every_cut(config, device):
    x, weight, bias = make(config.tile_m - 1, (4500, 2500), torch.bfloat16, device)
    packed = pack_tiles(weight)
    y = tile_linear_cuda(x, packed, bias, "none", config)
    torch.testing.assert_close(y, exact(x, weight, bias), **matmul_tolerance(x.dtype, 2500))
    again = tile_linear_cuda(x, packed, bias, "none", config)
    assert torch.equal(y, again)  # the order of the sums is fixed


@pytest.mark.cuda
@hopper
def test_kernel_takes_any_strides_and_addresses(device):
    x, weight, _ = make(7, (100, 264), torch.float16, device)
    packed = pack_tiles(weight)
    expected = exact(x, weight, None)
    shifted = torch.empty(7 * 264 + 1, dtype=x.dtype, device=device)[1:].view(7, 264).copy_(x)
    wide = torch.full((7, 300), torch.nan, dtype=x.dtype, device=device)
    wide[:, :264] = x
    for own in (x.t().contiguous().t(), shifted, wide[:, :264]):
        y = tile_linear(own, packed, None)
        torch.testing.assert_close(y, expected, **matmul_tolerance(x.dtype, 264))


@pytest.mark.cuda
@hopper
def test_kernel_runs_in_a_graph_and_leaves_nan_columns_apart(device):
    x, weight, _ = make(16, (512, 512), torch.bfloat16, device)
    packed = pack_tiles(weight)
    tile_linear(x, packed, None)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tile_linear(x, packed, None)
        z = tile_linear(y, packed, None)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        z.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(y, exact(x, weight, None), **matmul_tolerance(x.dtype, 512))
        assert torch.equal(z, tile_linear(y, packed, None))
    x[3] = torch.nan
    y = tile_linear(x, packed, None)
    assert y[3].isnan().all()
    assert not y[[0, 1, 2, *range(4, 16)]].isnan().any()


@pytest.mark.cuda
@hopper
def test_a_cut_without_room_is_refused(device):
    x, weight, _ = make(64, (64, 8192), torch.bfloat16, device, sparsity=0.0)
    host = pack_tiles(weight.cpu(), unit=1, segment=4096)
    packed = TileWeight.from_tensors(
        [t.to(device) for t in host.tensors()], host.layout, host.shape
    )
    with pytest.raises(ArgumentError, match="config: expected at most 232448 bytes"):
        tile_linear_cuda(x, packed, None, "none", TileConfig(64, 4, 1, 2))
