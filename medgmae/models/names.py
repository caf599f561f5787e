"""The names of models as types, so that a type checker knows what ``create_model("...")`` returns.

A name that is missing here works all the same: for a type checker it is then a :class:`~medgmae.models.encoder.Model`.
"""

from __future__ import annotations

from typing import Literal

EncoderName = Literal[
    "vim_base_patch16_160",
    "vim_large_patch16_160",
    "vim_nano_patch8_32",
    "vim_small_patch16_160",
    "vim_small_patch16_160.mamba_mae",
    "vim_small_patch32_160",
    "vim_small_patch32_160.mamba_mae",
    "vim_small_patch4_160",
    "vim_small_patch4_160.mamba_mae",
    "vim_small_patch8_160",
    "vim_tiny_patch16_160",
    "vim_tiny_patch8_64",
    "vit2d_base_patch16_224",
    "vit_base_patch16_128",
    "vit_base_patch16_256",
    "vit_base_patch16_96",
    "vit_base_patch16_96.glmae",
    "vit_base_patch16_96.medgmae",
    "vit_base_patch16_96x96x16",
    "vit_base_patch8_96",
    "vit_base_patch8_96.medgmae",
    "vit_base_patch4x16x16_32x256x256",
    "vit_base_patch4x16x16_32x256x256.m3dclip",
    "vit_base_patch4x16x16_32x256x256.segvol",
    "vit_huge_patch14_252",
    "vit_huge_patch16_96",
    "vit_large_patch16_112",
    "vit_large_patch16_112.3dino",
    "vit_large_patch16_256",
    "vit_large_patch16_256.tangerine",
    "vit_large_patch16_96",
    "vit_nano_patch8_32",
    "vit_tiny_patch8_64",
    "vit_tiny_patch8_64.demo",
    "vit_wide_patch12_96",
    "vit_wide_patch12_96.hiendmae",
    "vit_wide_patch12_96.medgmae",
    "vit_wide_patch16_96",
    "vit_wide_patch16_96.medgmae",
]
"""Encoders."""

VoxelName = Literal[
    "mae2d_vit_base_patch16_224",
    "mae2d_vit_nano_patch8_32",
    "mae_hiend_vit_wide_patch12_96",
    "mae_hiend_vit_wide_patch12_96.hiendmae",
    "mae_vim_base_patch16_160",
    "mae_vim_large_patch16_160",
    "mae_vim_nano_patch8_32",
    "mae_vim_small_patch16_160",
    "mae_vim_small_patch16_160.mamba_mae",
    "mae_vim_small_patch32_160",
    "mae_vim_small_patch32_160.mamba_mae",
    "mae_vim_small_patch4_160",
    "mae_vim_small_patch4_160.mamba_mae",
    "mae_vim_small_patch8_160",
    "mae_vim_tiny_patch8_64",
    "mae_vit_base_patch16_128",
    "mae_vit_base_patch16_128.selfmedmae_brats",
    "mae_vit_base_patch16_256",
    "mae_vit_base_patch16_96",
    "mae_vit_base_patch16_96.selfmedmae_btcv",
    "mae_vit_base_patch16_96_dec512",
    "mae_vit_base_patch16_96_dec576",
    "mae_vit_base_patch16_96x96x16",
    "mae_vit_base_patch16_96x96x16.selfmedmae_uva",
    "mae_vit_huge_patch14_252",
    "mae_vit_large_patch16_256",
    "mae_vit_large_patch16_256.tangerine",
    "mae_vit_nano_patch8_32",
    "mae_vit_tiny_patch8_64",
    "mae_vit_tiny_patch8_64.demo",
    "mae_vit_wide_patch12_96",
    "mae_vit_wide_patch16_96",
]
"""Masked autoencoders of voxels."""

GaussianName = Literal[
    "gmae_vit_base_patch16_96",
    "gmae_vit_base_patch16_96.medgmae",
    "gmae_vit_base_patch16_96_cgs",
    "gmae_vit_base_patch16_96_cgs.medgmae",
    "gmae_vit_base_patch16_96_hierarchical",
    "gmae_vit_base_patch16_96_hierarchical.medgmae",
    "gmae_vit_base_patch16_96_residual",
    "gmae_vit_base_patch16_96_residual.medgmae",
    "gmae_vit_base_patch8_96",
    "gmae_vit_base_patch8_96.medgmae",
    "gmae_vit_nano_patch8_32",
    "gmae_vit_tiny_patch8_64",
    "gmae_vit_wide_patch12_96",
    "gmae_vit_wide_patch12_96.medgmae",
    "gmae_vit_wide_patch16_96",
    "gmae_vit_wide_patch16_96.medgmae",
]
"""Gaussian masked autoencoders."""

SegmenterName = Literal[
    "unetr2d_vit_base_patch16_224",
    "unetr_vim_small_patch16_160",
    "unetr_vim_tiny_patch8_64",
    "unetr_vit_base_patch16_128",
    "unetr_vit_base_patch16_224x224x16_slice",
    "unetr_vit_base_patch16_96",
    "unetr_vit_base_patch16_96_f48",
    "unetr_vit_base_patch16_96x96x16",
    "unetr_vit_base_patch8_96",
    "unetr_vit_large_patch16_256",
    "unetr_vit_nano_patch8_32",
    "unetr_vit_tiny_patch8_64",
]
"""UNETRs."""
