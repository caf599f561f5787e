"""Parts of a computation that autocast must leave alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """A context on the device of ``like`` in which products have the precision of their inputs, autocast or not."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)
