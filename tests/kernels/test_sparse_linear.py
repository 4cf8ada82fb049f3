"""The operator in front of all kernels: which one runs, shapes, errors, autograd, autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.kernels import sparse_linear as module
from resu_compile.kernels.packed_linear import FORMATS, pack_linear
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel, batch_bucket
from resu_compile.kernels.sparse_linear import (
    sparse_linear,
    sparse_linear_autocast,
    sparse_linear_reference,
)
from tests.tolerances import EXACT, matmul_tolerance

CUDA = torch.cuda.is_available()
cuda = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = (Kernel.DENSE, Kernel.CSR, Kernel.ROWS, Kernel.TILES, Kernel.UNPACK)
OP = torch.ops.resu_compile.sparse_linear.default


def make_weight(shape, dtype=torch.float32, device="cpu", *, transposed=False):
    """About half pruned, at most 2 of each 4 inputs kept, one row empty."""
    rows, columns = shape
    weight = torch.randn(columns, rows, device=device, dtype=dtype).t()
    groups = -(-columns // 4)
    keep = torch.rand(rows, groups, 4, device=device).argsort(-1) < 2
    weight.masked_fill_(~keep.view(rows, groups * 4)[:, :columns], 0)
    if rows > 1:
        weight[rows // 2] = 0
    return weight if transposed else weight.contiguous()


def everywhere(kernel):
    return [int(kernel)] * len(BUCKET_ROWS)


def arguments(x, weight, kernel, bias=None, activation="none", *, formats=(), released=False):
    """Positional arguments of the op for a plan of one kernel."""
    packed = pack_linear(weight.detach(), None, {kernel, *formats})
    dense = None if released else weight
    layout, shape = list(packed.layout), list(weight.shape)
    return x, dense, list(packed.tensors()), layout, bias, shape, everywhere(kernel), activation


def call(x, weight, kernel, bias=None, activation="none", **options):
    return sparse_linear(*arguments(x, weight, kernel, bias, activation, **options))


# -- which kernel ----------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [1, 2, 3, 9, 300, 600])
def test_the_plan_decides_by_rows(rows, device):
    weight, other = make_weight((8, 24), device=device), torch.randn(8, 24, device=device)
    packed = pack_linear(weight, None, [Kernel.UNPACK])
    x = torch.randn(rows, 24, device=device)
    plan = everywhere(Kernel.DENSE)
    plan[batch_bucket(rows)] = int(Kernel.UNPACK)  # the only bucket that reads the packed weight
    rest = (list(packed.layout), None, [8, 24])
    assert_close(sparse_linear(x, other, packed.tensors(), *rest, plan), F.linear(x, weight))
    swapped = [int(Kernel.UNPACK - k) for k in plan]
    assert_close(sparse_linear(x, other, packed.tensors(), *rest, swapped), F.linear(x, other))


@pytest.mark.parametrize("kernel", FORMATS, ids=lambda kernel: kernel.name)
def test_each_kernel_reads_its_own_format(kernel, monkeypatch):
    weight = make_weight((16, 64))
    x = torch.randn(3, 64)
    form = module.format_of(kernel)
    ran = []

    def linear(*args):
        ran.append(args[1])
        return form.linear(*args)

    watched = {int(kernel): form._replace(linear=linear)}
    monkeypatch.setattr(module, "format_of", lambda k: watched[int(k)])
    y = call(x, weight, kernel, formats=FORMATS)
    assert_close(y, F.linear(x, weight), **matmul_tolerance(x.dtype, 64))
    assert [type(own) for own in ran] == [type(form.pack(weight, None))]


def test_where_a_kernel_cannot_run_the_dense_product_does(monkeypatch):
    weight = make_weight((8, 24), torch.float64)
    x = torch.randn(2, 24, dtype=torch.float64)
    for kernel in (Kernel.ROWS, Kernel.TILES):  # no double precision
        assert_close(call(x, weight, kernel, released=True), F.linear(x, weight))
    monkeypatch.setattr(module, "has_csr_kernel", lambda *_: False)
    assert_close(call(x, weight, Kernel.CSR, released=True), F.linear(x, weight))


def test_a_released_weight_is_unpacked_for_the_dense_kernel(device):
    weight = make_weight((8, 24), device=device)
    x = torch.randn(2, 24, device=device)
    y = call(x, weight, Kernel.DENSE, formats=[Kernel.ROWS], released=True)
    assert_close(y, F.linear(x, weight))


# -- the op against the reference ------------------------------------------------------------
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (37, 101), (1, 1)], ids=str)
def test_op_matches_reference(shape, dtype, kernel, device):
    weight = make_weight(shape, dtype, device)
    bias = torch.randn(shape[0], dtype=dtype, device=device)
    exact = pack_linear(weight.double(), None, [Kernel.CSR])
    for rows, b, activation in ((1, bias, "none"), (3, None, "silu"), (20, bias, "gelu")):
        x = torch.randn(rows, shape[1], dtype=dtype, device=device)
        wide = None if b is None else b.double()
        expected = sparse_linear_reference(x.double(), exact, wide, activation).to(dtype)
        tolerance = matmul_tolerance(dtype, shape[1])
        if activation != "none":
            tolerance["rtol"] *= 4  # the dense product is rounded before its activation too
            tolerance["atol"] += 4 * torch.finfo(dtype).eps  # near 0 they differ most
        y = call(x, weight, kernel, b, activation)
        assert y.dtype == dtype
        assert_close(y, expected, **tolerance)


@pytest.mark.parametrize("kernel", [Kernel.DENSE, Kernel.CSR, Kernel.UNPACK], ids=lambda k: k.name)
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(24), id="vector"),
        pytest.param(torch.randn(2, 3, 24), id="3d"),
        pytest.param(torch.randn(3, 2, 24).transpose(0, 1), id="batch transposed"),
        pytest.param(torch.randn(24, 9).t(), id="columns first"),
        pytest.param(torch.randn(1, 24).expand(4, 24), id="expanded"),
        pytest.param(torch.randn(5, 48)[:, ::2], id="strided"),
        pytest.param(torch.randn(0, 24), id="no rows"),
        pytest.param(torch.randn(2, 0, 24), id="no rows 3d"),
    ],
)
def test_leading_dimensions_and_strides(x, kernel, device):
    x = x.to(device)
    weight, bias = make_weight((10, 24), device=device), torch.randn(10, device=device)
    y = call(x, weight, kernel, bias)
    assert y.shape == (*x.shape[:-1], 10)
    assert y.is_contiguous()
    assert_close(y, F.linear(x, weight, bias), **matmul_tolerance(torch.float32, 24))


@pytest.mark.parametrize("kernel", [Kernel.DENSE, Kernel.CSR], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (4, 8)])
def test_nothing_stored(shape, kernel, device):
    weight = torch.zeros(shape, device=device)
    bias = torch.randn(shape[0], device=device)
    x = torch.randn(3, shape[1], device=device)
    expected = torch.relu(bias).expand(3, -1)
    assert_close(call(x, weight, kernel, bias, "relu"), expected, **EXACT)


# -- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ArgumentError, r"expected x of shape \(\.\.\., 8\)"),
        ({"x": torch.ones(())}, ArgumentError, r"got \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, ArgumentTypeError, "expected x of a floating"),
        ({"weight": torch.ones(4)}, ArgumentError, r"expected weight of shape \(4, 8\)"),
        ({"bias": torch.zeros(3)}, ArgumentError, r"expected bias of shape \(4,\), got \(3,\)"),
        ({"shape": [4]}, ArgumentError, r"expected shape \(N, K\), got \(4,\)"),
        ({"packed": []}, ArgumentError, "expected 3 packed tensors for this layout, got 0"),
        ({"layout": [2, 3]}, ArgumentError, "expected that of a PackedLinear"),
        ({"plan": [0]}, ArgumentError, "expected a plan of 10 kernels"),
        ({"activation": "tanh"}, ArgumentError, "expected one of .* got 'tanh'"),
        ({"plan": everywhere(Kernel.ROWS)}, ArgumentError, "Kernel.ROWS.*got CSR"),
        (
            {"weight": None, "packed": [], "layout": [0]},
            ArgumentError,
            "expected a dense weight or a packed one",
        ),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_bad_input(change, error, message, fake):
    weight = make_weight((4, 8))
    packed = pack_linear(weight, None, [Kernel.CSR])
    inputs = {"x": torch.ones(2, 8), "weight": weight, "packed": list(packed.tensors())}
    inputs |= {"layout": list(packed.layout), "bias": None, "shape": [4, 8]}
    inputs |= {"plan": everywhere(Kernel.CSR), "activation": "none"} | change
    with pytest.raises(error, match=message):
        (module._sparse_linear_fake if fake else sparse_linear)(**inputs)


def test_unpacking_needs_a_format_when_traced():
    with pytest.raises(ArgumentError, match=r"a format to expand for Kernel.UNPACK"):
        module._sparse_linear_fake(
            torch.ones(2, 8), torch.ones(4, 8), [], [0], None, [4, 8], everywhere(Kernel.UNPACK),
            "none",
        )  # fmt: skip


# -- operator --------------------------------------------------------------------------------
@pytest.mark.parametrize("with_grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize(
    ("kernel", "released", "with_bias", "transposed"),
    [
        (Kernel.CSR, False, True, False),
        (Kernel.CSR, True, False, True),
        (Kernel.UNPACK, True, True, False),
        (Kernel.DENSE, False, True, True),
        *[
            pytest.param(k, True, True, False, marks=cuda)
            for k in (Kernel.ROWS, Kernel.TILES, Kernel.SEMI)
        ],
    ],
)
def test_opcheck(kernel, released, with_bias, transposed, with_grad, device):
    if CUDA and kernel is Kernel.CSR:
        device = torch.device("cpu")
    weight = make_weight((6, 10), device=device, transposed=transposed)
    x = torch.randn(10, 3, 2, device=device).permute(2, 1, 0)
    bias = torch.randn(6, device=device) if with_bias else None
    for tensor in (x, weight, bias):
        if tensor is not None:
            tensor.requires_grad_(with_grad)
    torch.library.opcheck(OP, arguments(x, weight, kernel, bias, released=released))
    if not with_grad:
        torch.library.opcheck(OP, arguments(x, weight, kernel, bias, "gelu", released=released))


def test_opcheck_of_unpacking(device):
    packed = pack_linear(make_weight((6, 10), device=device), None, {Kernel.UNPACK})
    inputs = (list(packed.tensors()), list(packed.layout), [6, 10], torch.float64)
    torch.library.opcheck(torch.ops.resu_compile.unpack_linear.default, inputs)


@pytest.mark.parametrize("released", [False, True])
def test_gradients_are_those_of_the_dense_product(released, device):
    weight = make_weight((5, 7), torch.float64, device)
    weight.requires_grad_(not released)
    x = torch.randn(2, 3, 7, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    _, _, packed, layout, *_ = arguments(x, weight, Kernel.UNPACK)
    plan = everywhere(Kernel.UNPACK if released else Kernel.DENSE)

    def product(x, bias, dense=None):
        return sparse_linear(x, dense, packed, layout, bias, [5, 7], plan)

    assert torch.autograd.gradcheck(product, (x, bias) if released else (x, bias, weight))
    out = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    ours = torch.autograd.grad(product(x, bias), (x, bias), out)
    theirs = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), out)
    for own, dense in zip(ours, theirs, strict=True):
        assert_close(own, dense)


def test_an_activation_has_no_gradient():
    weight, x = make_weight((4, 8)), torch.randn(2, 8, requires_grad=True)
    with pytest.raises(ArgumentError, match="expected 'none' where a gradient is needed"):
        call(x, weight, Kernel.CSR, activation="relu")
    with torch.no_grad():
        assert (call(x, weight, Kernel.CSR, activation="relu") >= 0).all()


def test_one_graph_serves_every_batch_size():
    weight = make_weight((16, 24))
    packed = pack_linear(weight, None, [Kernel.CSR])
    plan = [int(Kernel.CSR if rows <= 8 else Kernel.DENSE) for rows in BUCKET_ROWS]
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def model(x, dense):
        return sparse_linear(
            x, dense, list(packed.tensors()), list(packed.layout), None, [16, 24], plan
        )

    zeros = torch.zeros_like(weight)  # tells the paths apart
    with torch.no_grad():
        for rows in (3, 8, 5, 100, 2, 7):
            x = torch.randn(rows, 24)
            torch._dynamo.mark_dynamic(x, 0)
            expected = F.linear(x, weight) if rows <= 8 else torch.zeros(rows, 16)
            assert_close(model(x, zeros), expected, **matmul_tolerance(x.dtype, 24))
    assert counter.frame_count == 1


# -- autocast --------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", [Kernel.DENSE, Kernel.CSR, Kernel.UNPACK], ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_as_linear(enabled, dtype, kernel, device):
    weight, bias = make_weight((6, 40), device=device), torch.randn(6, device=device)
    x = torch.randn(3, 40, device=device)
    inputs = arguments(x, weight, kernel, bias)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        y = sparse_linear_autocast(*inputs)
        expected = F.linear(x, weight, bias)
    assert y.dtype == expected.dtype == (dtype if enabled else torch.float32)
    assert_close(y, expected, **matmul_tolerance(y.dtype, 40))


def test_autocast_leaves_float64_alone(device):
    weight = make_weight((6, 40), torch.float64, device)
    x = torch.randn(3, 40, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = sparse_linear_autocast(*arguments(x, weight, Kernel.CSR))
    assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_op_itself_ignores_autocast(kernel, device):
    weight = make_weight((6, 40), device=device)
    x = torch.randn(3, 40, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = call(x, weight, kernel)
    assert_close(y, F.linear(x, weight), **matmul_tolerance(torch.float32, 40))


def test_autocast_is_read_while_tracing():
    weight = make_weight((6, 40))
    _, *rest = arguments(None, weight, Kernel.CSR)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def model(x):
        return sparse_linear_autocast(x, *rest)

    x = torch.randn(3, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = model(x), F.linear(x, weight)
    assert_close(y, expected, **matmul_tolerance(torch.bfloat16, 40))


# -- CUDA ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kernel", "dtype", "shape"),
    [
        pytest.param(kernel, dtype, shape, marks=cuda, id=f"{kernel.name}-{dtype}-{shape}")
        for kernel, dtype, shape in itertools.product(
            (Kernel.ROWS, Kernel.TILES, Kernel.UNPACK, Kernel.SEMI),
            DTYPES,
            [(1024, 4096), (333, 1000)],
        )
    ],
)
def test_cuda_sizes(kernel, dtype, shape):
    weight = make_weight(shape, dtype, "cuda")
    bias = torch.randn(shape[0], dtype=dtype, device="cuda")
    exact = weight.double()
    for rows, activation in itertools.product((1, 2, 5, 8, 31, 64, 200), ("none", "gelu_tanh")):
        x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
        expected = F.linear(x.double(), exact, bias.double())
        if activation != "none":
            expected = F.gelu(expected, approximate="tanh")
        y = call(x, weight, kernel, bias, activation, released=True)
        if kernel is Kernel.UNPACK:  # cuBLAS may round partial sums: single values are off by more
            error = (y.double() - expected).norm() / expected.norm()
            assert error < torch.finfo(dtype).eps * (64 if dtype == torch.float32 else 1)
            continue
        tolerance = matmul_tolerance(dtype, shape[1])
        tolerance["rtol"] *= 4
        tolerance["atol"] += 4 * torch.finfo(dtype).eps
        assert_close(y, expected.to(dtype), **tolerance)


@pytest.mark.parametrize(
    ("kernel", "rows"),
    [
        pytest.param(k, rows, marks=cuda)
        for k in (Kernel.ROWS, Kernel.TILES, Kernel.UNPACK)
        for rows in (1, 8)
    ],
)
def test_cuda_graph_capture(kernel, rows):
    weight = make_weight((512, 1024), torch.bfloat16, "cuda")
    x = torch.randn(rows, 1024, dtype=torch.bfloat16, device="cuda")
    inputs = arguments(x, weight, kernel, released=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which packs the weight
    with torch.cuda.stream(stream):
        sparse_linear(*inputs)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear(*inputs)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(y, sparse_linear(*inputs), **EXACT)
