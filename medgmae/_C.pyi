"""Types of the native module; cuda/module.cpp defines it."""

from collections.abc import Sequence

from medgmae.ops.native import BuildInfo

interface: int

def build_info() -> BuildInfo: ...
def voxelize(
    dtype: int,
    batch: int,
    count: int,
    patches: int,
    addresses: list[int],
    size: list[int],
    patch: list[int],
    origin: list[float],
    step: list[float],
    support: float,
    widths: tuple[float, float],
    threads: int,
    variant: str = "",
) -> None: ...
def project(
    dtype: int,
    batch: int,
    count: int,
    views: int,
    addresses: list[int],
    size: list[int],
    support: float,
    parallel: bool,
    affine: bool,
    threads: int,
    variant: str = "",
) -> bool: ...
def cuda_problem() -> str | None: ...
def voxelize_cuda_workspace(
    batch: int, count: int, patches: int, size: list[int], patch: list[int], backward: bool
) -> int: ...
def voxelize_cuda(
    dtype: int,
    batch: int,
    count: int,
    patches: int,
    addresses: list[int],
    size: list[int],
    patch: list[int],
    origin: list[float],
    step: list[float],
    support: float,
    widths: tuple[float, float],
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> None: ...
def project_cuda_workspace(dtype: int, batch: int, count: int, views: int, size: list[int], backward: bool) -> int: ...
def project_cuda(
    dtype: int,
    batch: int,
    count: int,
    views: int,
    addresses: list[int],
    size: list[int],
    support: float,
    parallel: bool,
    affine: bool,
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> None: ...
def banded(
    stack: int,
    rows_in: int,
    rows_out: int,
    length: int,
    taps: int,
    first: int,
    weights: int,
    input: int,
    out: int,
    add: bool,
    threads: int,
    variant: str = "",
) -> None: ...
def prefer_large_pages(address: int, bytes: int) -> None: ...
def selective_scan(
    dtype: int,
    sizes: dict[str, int],
    streams: dict[str, tuple[int, int, int, int]],
    matrices: dict[str, tuple[int, int, int, int]],
    arrays: dict[str, tuple[int, int]],
    stream_type: int,
    threads: int,
    variant: str = "",
) -> None: ...
def causal_conv1d(
    dtype: int,
    sizes: dict[str, int],
    streams: dict[str, tuple[int, int, int, int]],
    arrays: dict[str, tuple[int, int]],
    stream_type: int,
    threads: int,
    variant: str = "",
) -> None: ...
def project_volume(
    dtype: int,
    volume: Sequence[int],
    views: int,
    size: Sequence[int],
    addresses: Sequence[int],
    parallel: bool,
    slab: int,
    adjoint: bool,
    threads: int,
    variant: str = "",
) -> None: ...
def selective_scan_cuda_workspace(
    dtype: int,
    sizes: dict[str, int],
    streams: dict[str, tuple[int, int, int, int]],
    matrices: dict[str, tuple[int, int, int, int]],
    arrays: dict[str, tuple[int, int]],
    stream_type: int,
) -> int: ...
def selective_scan_cuda(
    dtype: int,
    sizes: dict[str, int],
    streams: dict[str, tuple[int, int, int, int]],
    matrices: dict[str, tuple[int, int, int, int]],
    arrays: dict[str, tuple[int, int]],
    stream_type: int,
    workspace: int,
    workspace_bytes: int,
    stream: int,
) -> None: ...
def causal_conv1d_cuda(
    dtype: int,
    sizes: dict[str, int],
    streams: dict[str, tuple[int, int, int, int]],
    arrays: dict[str, tuple[int, int]],
    stream_type: int,
    stream: int,
) -> None: ...
