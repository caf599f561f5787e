"""What compute-sanitizer watches: every kernel of the renderer once, on small and on odd volumes."""

from __future__ import annotations

import torch

from medgmae.ops import native_info, voxelize


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


def main() -> None:
    """All cases."""
    if not (native_info().get("cuda") or {}).get("devices"):
        raise SystemExit("no CUDA device, or no CUDA kernels in medgmae._C")
    for dtype in (torch.float32, torch.float64):
        for support in ("box", 3.0, None):
            run(dtype, 7, (9, 17, 19), support, 0.1)
            run(dtype, 1, (1, 1, 33), support, 0.01)
    run(torch.float32, 5000, (33, 16, 40), "box", 0.02)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
