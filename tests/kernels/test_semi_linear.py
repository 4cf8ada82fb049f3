"""Products by a 2:4 weight: the dispatch and the kernel against the dense product in float64."""

import pytest
import torch
from torch.testing import assert_close

from resu_compile.errors import ArgumentError
from resu_compile.kernels.plan import ACTIVATIONS, apply_activation
from resu_compile.kernels.semi_linear import (
    is_available,
    is_supported,
    semi_config,
    semi_linear,
    semi_linear_cuda,
    semi_linear_reference,
)
from resu_compile.kernels.semi_weight import pack_semi
from tests.tolerances import matmul_tolerance

CUDA = torch.cuda.is_available()
needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # (rows of x, out_features, in_features)
    pytest.param((1, 16, 256), id="one"),
    pytest.param((13, 200, 520), id="ragged"),
    pytest.param((64, 64, 1024), id="even"),
    pytest.param((130, 33, 72), id="many rows"),
]


def two_of_four(weight):
    """The two largest of each four columns of a row."""
    groups = weight.abs().unflatten(1, (-1, 4))
    return (groups.argsort(-1, descending=True).argsort(-1) < 2).flatten(1)


def make(shape, dtype, device="cpu", bias=True):
    """x, the packed weight, its dense form and a bias."""
    m, n, k = shape
    weight = torch.randn(n, k)
    mask = two_of_four(weight)
    weight = torch.where(mask, weight, 0).to(device, dtype)
    x = torch.randn(m, k).to(device, dtype)
    packed = pack_semi(weight, mask.to(device))
    return x, packed, weight, torch.randn(n).to(device, dtype) if bias else None


def exact(x, weight, bias, activation="none"):
    """The product and what follows in float64, rounded once."""
    y = x.double() @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    return apply_activation(y, activation).to(x.dtype)


@pytest.mark.parametrize("fn", [semi_linear, semi_linear_reference], ids=["op", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_dense_product(fn, shape, dtype):
    x, packed, weight, bias = make(shape, dtype)
    tolerance = matmul_tolerance(dtype, shape[2])
    assert_close(fn(x, packed, bias), exact(x, weight, bias), **tolerance)
    assert_close(fn(x, packed), exact(x, weight, None), **tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_comes_before_the_rounding(activation):
    x, packed, weight, bias = make((13, 48, 256), torch.bfloat16)
    y = semi_linear(x, packed, bias, activation)
    assert_close(y, exact(x, weight, bias, activation), **matmul_tolerance(torch.bfloat16, 256))
    assert torch.equal(y, semi_linear_reference(x, packed, bias, activation))


def test_weights_are_rounded_to_the_dtype_of_x():
    x, packed, weight, _ = make((5, 16, 256), torch.float32)
    low = x.bfloat16()
    expected = exact(low, weight.bfloat16(), None)
    assert_close(semi_linear(low, packed), expected, **matmul_tolerance(torch.bfloat16, 256))


def test_strides_of_x_do_not_matter():
    x, packed, weight, bias = make((7, 16, 64), torch.float32)
    turned = x.t().contiguous().t()
    assert_close(
        semi_linear(turned, packed, bias),
        exact(x, weight, bias),
        **matmul_tolerance(torch.float32, 64),
    )


def test_which_weights_the_tensor_cores_take():
    assert is_supported(4096, 4096, torch.bfloat16)
    assert is_supported(1, 8, torch.float16)
    assert not is_supported(4096, 4096, torch.float32)
    assert not is_supported(64, 36, torch.float16)  # x is copied 16 bytes at a time
    assert not is_available(torch.device("cpu"))


def test_wrong_arguments_are_named():
    x, packed, _, bias = make((3, 16, 64), torch.float32)
    for arguments, message in (
        ((x[:, :60], packed), r"x: expected shape \(M, 64\)"),
        ((x[0], packed), r"x: expected shape \(M, 64\)"),
        ((x.double(), packed), "x: expected float32, float16 or bfloat16, got torch.float64"),
        ((x, packed, bias[:4]), r"bias: expected shape \(16,\) or None"),
        ((x, packed, bias, "tanh"), "activation: expected one of"),
    ):
        with pytest.raises(ArgumentError, match=f"^{message}"):
            semi_linear(*arguments)


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 33, 64, 65, 1000])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_the_cut_covers_the_work(rows, capability):
    for n_blocks, chunks in ((1, 1), (256, 16), (896, 16), (256, 56)):
        config = semi_config(rows, n_blocks, chunks, 132, capability)
        assert config.split == 1 or (2 * config.split <= chunks and capability >= (9, 0))
        assert config.wide == (capability == (9, 0) and rows > 16)
        assert config.warps % 4 == 0
        per_block = 8 * config.tiles, config.warps * config.blocks
        tiles = config.grid(rows, n_blocks) / config.split
        assert tiles * per_block[0] * per_block[1] >= rows * n_blocks
        assert config.tiles == 8 or per_block[0] >= rows
        assert config.shared_bytes * config.least_blocks <= 227 * 1024


def test_small_layers_share_their_columns():
    cuts = {
        (1, 256, 16): 4,  # 4096 x 4096
        (1, 896, 16): 1,  # 14336 x 4096: enough rows
        (16, 256, 56): 4,
        (64, 896, 16): 2,
        (64, 512, 32): 2,
        (1, 1, 1): 1,
    }
    found = {case: semi_config(*case, 132, (9, 0)).split for case in cuts}
    assert found == cuts


# -- CUDA ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 13, 32, 50, 130])
@pytest.mark.parametrize("width", [(16, 256), (200, 520), (1000, 1032), (4096, 4096)], ids=str)
class TestCuda:
    pytestmark = needs_cuda

    def test_the_kernel_matches_and_writes_nothing_else(self, width, rows, dtype):
        x, packed, weight, bias = make((rows, *width), dtype, "cuda")
        bias = (None, bias, bias.float())[rows % 3]
        buffer = torch.full((rows * width[0] + 64,), torch.nan, device="cuda", dtype=dtype)
        out = buffer[: rows * width[0]].view(rows, width[0])
        semi_linear_cuda(x, packed, bias, out=out)
        expected = exact(x, weight, bias)
        assert_close(out, expected, **matmul_tolerance(dtype, width[1]))
        assert buffer[rows * width[0] :].isnan().all()
        assert torch.equal(semi_linear(x, packed, bias), out)  # to the bit, run after run


@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestCudaActivations:
    pytestmark = needs_cuda

    def test_the_kernel_applies_it(self, activation):
        x, packed, weight, bias = make((13, 200, 520), torch.float16, "cuda")
        y = semi_linear_cuda(x, packed, bias, activation)
        expected = exact(x, weight, bias, activation)
        assert_close(y, expected, **matmul_tolerance(torch.float16, 520))
        sliced = torch.cat([x, x], 1)[:, 520:]
        assert torch.equal(semi_linear_cuda(sliced, packed, bias, activation), y)
