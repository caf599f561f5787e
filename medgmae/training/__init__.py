"""Pre-training, fine-tuning, and training aids on timm's optimisation tools."""

from medgmae.training.finetune import finetune
from medgmae.training.glmae_file import write_glmae
from medgmae.training.machine import Machine
from medgmae.training.optim import cosine_schedule, param_groups, poly_schedule, scale_lr
from medgmae.training.predict import Predictor
from medgmae.training.pretrain import pretrain
from medgmae.training.rehearsal import rehearse
from medgmae.training.runs import Run, read_metrics, summary_of
from medgmae.training.settings import (
    CropSettings,
    Phase,
    RunSettings,
    Settings,
    TaskSettings,
    TrainingSettings,
    TuneSettings,
    TuningSettings,
    ViewSettings,
    read_recipe,
    read_settings,
    recipes,
)
from medgmae.training.stopping import Stopped
from medgmae.training.tables import TrainingError, parse_change
from medgmae.training.targets import Targets, read_targets

__all__ = [
    "CropSettings",
    "Machine",
    "Phase",
    "Predictor",
    "Run",
    "RunSettings",
    "Settings",
    "Stopped",
    "Targets",
    "TaskSettings",
    "TrainingError",
    "TrainingSettings",
    "TuneSettings",
    "TuningSettings",
    "ViewSettings",
    "cosine_schedule",
    "finetune",
    "param_groups",
    "parse_change",
    "poly_schedule",
    "pretrain",
    "read_metrics",
    "read_recipe",
    "read_settings",
    "read_targets",
    "recipes",
    "rehearse",
    "scale_lr",
    "summary_of",
    "write_glmae",
]
