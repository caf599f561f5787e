"""Training aids on timm's optimisation tools."""

from medgmae.training.optim import cosine_schedule, param_groups

__all__ = ["cosine_schedule", "param_groups"]
