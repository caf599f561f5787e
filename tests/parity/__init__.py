"""Comparison with the numbers of the reference code bases; see README.md."""

from __future__ import annotations

from collections.abc import Callable

from parity.case import Case

Adapter = Callable[[Case], None]

ADAPTERS: dict[str, Adapter] = {}


def adapter(kind: str) -> Callable[[Adapter], Adapter]:
    """Enter a function as the one that compares cases whose ``parity_kind`` is ``kind``."""

    def enter(function: Adapter) -> Adapter:
        assert kind not in ADAPTERS, kind
        ADAPTERS[kind] = function
        return function

    return enter


def run(case: Case) -> None:
    """Compare one case; AssertionError says what differs, or that nothing here can compare it."""
    from parity import (  # noqa: F401 - they enter adapters
        beyond,
        colipri,
        glmae,
        mamba_mae,
        mamba_mae_maps,
        mamba_mae_models,
        mamba_mae_ops,
        mamba_mae_protocols,
        medgmae_cases,
        medgmae_gaussians,
        medgmae_render,
        preparations,
        primus,
        selfmedmae,
        selfmedmae_2d,
        selfmedmae_data,
        selfmedmae_scores,
        selfmedmae_training,
        selfmedmae_unetr,
        tangerine,
        tangerine_scans,
        tomography,
        tomography_voxels,
        voxelfm,
    )

    kind = case.spec.get("parity_kind")
    if kind not in ADAPTERS:
        raise AssertionError(
            f"{case.path}: no adapter for parity_kind {kind!r}: nothing can be compared. tests/parity needs one"
        )
    ADAPTERS[kind](case)
    case.finish()
