"""Training aids on timm's optimisation tools."""

from medgmae.training.optim import cosine_schedule, param_groups, scale_lr

__all__ = ["cosine_schedule", "param_groups", "scale_lr"]
