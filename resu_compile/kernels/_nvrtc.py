"""CUDA C++ compiled at run time: NVRTC and the driver, through ``cuda.bindings``.

A ``.cu`` file beside the kernels is compiled once for each device and set of definitions; launches
go to PyTorch's current stream, so that they are captured in CUDA graphs once the module is loaded.
PyTorch depends on ``cuda-bindings`` from 2.10 on; where it is missing, Triton runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
from pathlib import Path
from typing import Any

import torch

from resu_compile.errors import KernelUnavailableError

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
OLDEST = (8, 0)  # compute capability: conversions to bfloat16


class CudaModule:
    """Kernels of one compiled source on one device."""

    def __init__(self, binary: bytes, threads: int) -> None:
        driver = importlib.import_module("cuda.bindings.driver")
        self._driver = driver
        self._module = _checked(driver.cuModuleLoadData(binary))
        self._functions: dict[str, Any] = {}
        self._threads = threads

    def function(self, name: str) -> Any:
        """Handle of an ``extern "C"`` kernel."""
        found = self._functions.get(name)
        if found is None:
            found = _checked(self._driver.cuModuleGetFunction(self._module, name.encode()))
            self._functions[name] = found
        return found

    def allow_shared(self, name: str, size_bytes: int) -> None:
        """Let a kernel be launched with up to ``size_bytes`` of dynamic shared memory."""
        limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(self._driver.cuFuncSetAttribute(self.function(name), limit, size_bytes))

    def active_clusters(self, name: str, cluster: int, shared_bytes: int) -> int:
        """How many clusters of ``cluster`` blocks of a kernel the device runs at once."""
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value = driver.CUlaunchAttributeValue()
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster, 1, 1
        attribute.value = value
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = [attribute], 1
        return int(_checked(driver.cuOccupancyMaxActiveClusters(self.function(name), config)))

    def launch(
        self,
        name: str,
        grid: int | tuple[int, int],
        args: ctypes.Structure,
        *,
        cooperative: bool = False,
        shared_bytes: int = 0,
        threads: int | None = None,
        overlap: bool = False,
    ) -> None:
        """Launch on the current stream; ``args`` is the kernel's only parameter, by value.

        Args:
            name: the kernel.
            grid: number of blocks, or of blocks in x and y.
            args: what the kernel takes.
            cooperative: all blocks run at once, or the launch fails.
            shared_bytes: dynamic shared memory of a block; see ``allow_shared`` above 48 KB.
            threads: of a block, where they are not those that ``load_module`` was given.
            overlap: the kernel may start before those launched earlier have ended; it has to wait
                for them itself (``griddepcontrol.wait``). Needs compute capability 9.0.
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        address = ctypes.addressof(pointers)
        stream = self._driver.CUstream(torch.cuda.current_stream().cuda_stream)
        blocks = (grid, 1) if isinstance(grid, int) else grid
        size = (*blocks, 1, threads or self._threads, 1, 1, shared_bytes)
        function = self.function(name)
        if overlap:
            config = self._overlapping(size, stream)
            launched = self._driver.cuLaunchKernelEx(config, function, address, 0)
        elif cooperative:
            launched = self._driver.cuLaunchCooperativeKernel(function, *size, stream, address)
        else:
            launched = self._driver.cuLaunchKernel(function, *size, stream, address, 0)
        _checked(launched)

    def _overlapping(self, size: tuple[int, ...], stream: Any) -> Any:
        """Launch configuration with programmatic stream serialization."""
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        ids = driver.CUlaunchAttributeID
        attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = size[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ, config.sharedMemBytes = size[3:]
        config.hStream = stream
        config.attrs, config.numAttrs = [attribute], 1
        return config


@functools.cache
def load_module(
    files: tuple[str, ...],
    defines: tuple[tuple[str, int], ...],
    threads: int,
    device: int,
    *,
    specific: bool = False,
) -> CudaModule | None:
    """Compile ``files``, one after the other, for a device; None where that cannot be done.

    Args:
        files: names of ``.cu`` files in this folder; they include nothing.
        defines: macros and their values.
        threads: threads of a block.
        device: index of the CUDA device; has to be the current one.
        specific: use instructions that no other generation has (``wgmma``: target ``sm_90a``).
    """
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST or torch.version.hip:
        return None
    try:
        binary = _compile(files, defines, capability, specific=specific)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: NVRTC is not installed
        logger.warning("%s: not compiled, Triton runs instead: %s", ", ".join(files), error)
        return None
    return CudaModule(binary, threads)


def _compile(
    files: tuple[str, ...],
    defines: tuple[tuple[str, int], ...],
    capability: tuple[int, int],
    *,
    specific: bool = False,
) -> bytes:
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    text = "".join(f"#define {name} {value}\n" for name, value in defines)
    text += "".join(f'#line 1 "{file}"\n{(FOLDER / file).read_text()}\n' for file in files)
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), files[-1].encode(), 0, [], []))
    target = f"sm_{capability[0]}{capability[1]}{'a' if specific else ''}"
    options = [f"--gpu-architecture={target}".encode(), b"--std=c++17"]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise KernelUnavailableError(f"{files[-1]}: NVRTC gave {status}: {log.decode()}")
        binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return binary


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call that returns ``(status, value...)``; raises unless the status is 0."""
    status, *values = result
    if int(status):
        raise KernelUnavailableError(f"CUDA call: expected status 0, got {status}")
    return values[0] if values else None
