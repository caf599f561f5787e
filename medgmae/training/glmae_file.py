"""A run of GL-MAE's pre-training as one file in the layout of its authors' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medgmae.factory import create_model
from medgmae.training.tables import TrainingError, expect


def write_glmae(run: str | Path, path: str | Path) -> Path:
    """Write the two encoders of a run with views and a teacher into one file that GL-MAE's released code loads.

    ``student`` has its names behind ``module.backbone.``, which that code takes; ``teacher`` behind ``backbone.``, as
    DINO's code has it. Tables have a row of zeros for the class token in front. ``load_pretrained(model, path)`` reads
    the student again, ``"path::teacher"`` the teacher. The decoder and the projectors are not in the file: how the
    authors name them is not known.

    Args:
        run: the run's folder.
        path: of the file, replaced whole or not at all.

    Raises:
        TrainingError: the run has no teacher, its encoder is not a ViT with one class token and a table, or the file
            cannot be written.
    """
    run, path = Path(run), Path(path)
    expect(
        (run / "student").is_dir(),
        f"{run} has no student and teacher; expected the folder of a run with [global_local]",
    )
    networks = {"student": "module.backbone.", "teacher": "backbone."}
    content: dict[str, Any] = {}
    for name, prefix in networks.items():
        encoder: Any = create_model(run / "student" if name == "student" else run).encoder
        state = encoder.state_dict()
        plain = "blocks.0.attn.qkv.weight" in state and encoder.num_prefix_tokens == 1 and "pos_embed" in state
        expect(plain, f"{run}: the encoder is a {type(encoder).__name__}; GL-MAE's files hold a ViT with a class token")
        content[name] = {f"{prefix}{key}": value for key, value in _official(state).items()}
    partial = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise TrainingError(f"{path} could not be written: {error}") from error
    return path


def _official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's tensors as GL-MAE's class has them: a row of the table for the class token."""
    table = state["pos_embed"]
    return {**state, "pos_embed": torch.cat([table.new_zeros(1, 1, table.shape[2]), table], dim=1)}
