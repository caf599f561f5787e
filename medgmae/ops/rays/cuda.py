"""Line integrals of volumes on CUDA: the reference, there is no kernel of their own."""

from medgmae.ops.rays.reference import backward, forward

__all__ = ["backward", "forward"]
