"""Operators: one file each, with a torch reference for every device and native kernels where `medgmae._C` has them."""

from medgmae.ops._native import native_info, self_test
from medgmae.ops.causal_conv1d import causal_conv1d
from medgmae.ops.selective_scan import selective_scan
from medgmae.ops.voxelize import voxelize

__all__ = ["causal_conv1d", "native_info", "selective_scan", "self_test", "voxelize"]
