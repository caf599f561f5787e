"""Operators, one room each: a torch reference for every device and native kernels where `medgmae._C` has them."""

from medgmae.ops.check import self_test
from medgmae.ops.conv.operator import causal_conv1d
from medgmae.ops.native import native_info, use_native
from medgmae.ops.projection.operator import project
from medgmae.ops.rays.operator import back_project_volume, project_volume
from medgmae.ops.scan.operator import selective_scan
from medgmae.ops.voxel.operator import voxelize

__all__ = [
    "back_project_volume",
    "causal_conv1d",
    "native_info",
    "project",
    "project_volume",
    "selective_scan",
    "self_test",
    "use_native",
    "voxelize",
]
