"""What compute-sanitizer watches: every kernel once, on small and on odd volumes and sequences."""

from __future__ import annotations

import torch

from medgmae.ops import causal_conv1d, native_info, project, selective_scan, voxelize


def run(dtype: torch.dtype, count: int, size: tuple[int, int, int], support: str | float | None, scale: float) -> None:
    """Forward and backward of one random case, dense and as patches of one voxel in x."""
    random = torch.Generator().manual_seed(count)
    shapes = (2, count, 3), (2, count, 3), (2, count, 4), (2, count)
    values = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]
    values[0] = values[0] * 0.4 + 0.5
    values[1] = scale * values[1].exp()
    inputs = [value.to("cuda", dtype).requires_grad_() for value in values]
    voxelize(*inputs, size, support=support).square().sum().backward()
    patches = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    patch = (size[0], 1, size[2])
    voxelize(*inputs, size, support=support, patches=patches, patch_size=patch).sum().backward()


def shadows(dtype: torch.dtype, count: int, size: tuple[int, int], beam: str, scale: float) -> None:
    """Forward and backward of Gaussians in three views, one of them without area."""
    random = torch.Generator().manual_seed(count)
    shapes = (2, count, 3), (2, count, 3), (2, count, 4), (2, count)
    values = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes]
    values[0], values[1] = 20 * values[0], scale * values[1].exp()
    inputs = [value.to("cuda", dtype).requires_grad_() for value in values]
    first = [90.0, 3, 1] if beam == "cone" else [-1.0, 0.1, 0]
    view = [first, [-90.0, -size[1], -size[0]], [0, 2.0, 0.1], [0, 0.2, 2.0]]
    views = torch.tensor([view, view, [*view[:3], view[2]]], dtype=torch.float64, device="cuda")
    for support, affine in ((2.5, False), (None, True)):
        project(*inputs, views, size, beam=beam, support=support, affine=affine).square().sum().backward()


def scan(dtype: torch.dtype, shape: tuple[int, int, int], states: int, groups: int, reverse: bool) -> None:
    """A convolution and a scan (batch, channels, length) of its result, forward and backward."""
    random = torch.Generator().manual_seed(states)
    batch, channels, length = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random).to("cuda", dtype).requires_grad_()

    u, delta, z = (normal(batch, length, channels).transpose(1, 2) for _ in range(3))
    A, weight, bias = -normal(channels, states).float().exp(), normal(channels, 4).float(), normal(channels).float()
    B = normal(batch, length, groups, states).permute(0, 2, 3, 1)
    C = normal(batch, length, states).transpose(1, 2)
    x = causal_conv1d(u, weight, bias, "silu", reverse)
    out, state = selective_scan(x, delta, A, B, C, bias, z, bias, True, reverse, return_last_state=True)
    (out.float().sum() + state.sum()).backward()


def main() -> None:
    """All cases."""
    cuda = native_info()["cuda"]
    if cuda is None or not any(device["usable"] for device in cuda["devices"]):
        raise SystemExit(f"no GPU that runs the CUDA kernels of medgmae._C: {cuda}")
    for dtype in (torch.float32, torch.float64):
        for support in ("box", 3.0, None):
            run(dtype, 7, (9, 17, 19), support, 0.1)
            run(dtype, 1, (1, 1, 33), support, 0.01)
        for beam in ("cone", "parallel"):
            shadows(dtype, 7, (17, 70), beam, 5.0)
            shadows(dtype, 40, (1, 9), beam, 60.0)
    run(torch.float32, 5000, (33, 16, 40), "box", 0.02)
    shadows(torch.float32, 5000, (33, 70), "cone", 1.0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        scan(dtype, (2, 70, 150), 16, 1, False)
        scan(dtype, (1, 33, 67), 5, 3, True)
        scan(dtype, (1, 3, 1), 17, 3, False)
    scan(torch.float32, (1, 16, 3000), 16, 1, True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
