"""What the machine can do: the dtype that is fast on it, its memory, the speed of its matrix products.

In:  a device. Out: numbers and settings. Knows nothing of models or data.
"""

import ctypes
import sys
import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: what was asked for, or the fastest that is safe on this machine."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        # Before Ampere (8.0) bf16 is emulated; fp16 has matrix units from Volta (7.0) on.
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    # bf16 on a CPU pays only with instructions for it: AMX tiles, AVX512-BF16. Without it is emulated: 0.15x of fp32.
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    has = device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in units)
    return torch.bfloat16 if has else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for those of the next step.

    By default it gives large ones back to the system at once, and the next has to be cleared page by page: a quarter
    of a step on two cores (docs/performance.md). Nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # never


def used_gb(device: torch.device) -> float:
    """The most memory that this process has had so far: of tensors on a GPU, else of everything; 0: not known here."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of three: what a model FLOPs utilization (MFU) is a share of.

    Data sheets promise more than any product reaches (an H200 989 TFLOP/s in bf16, measured 791), and for CPUs nothing.
    """
    n = 8192 if device.type == "cuda" else 1024  # large enough to fill the device, 3 ms and 0.1 s
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(4):  # the first one sets things up
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        taken.append(time.perf_counter() - began)
    return 2 * n**3 / min(taken[1:])
