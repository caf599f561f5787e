"""Operators: one file each, with a torch reference for every device and native kernels where `medgmae._C` has them."""

from medgmae.ops._native import native_info, self_test
from medgmae.ops.voxelize import voxelize

__all__ = ["native_info", "self_test", "voxelize"]
