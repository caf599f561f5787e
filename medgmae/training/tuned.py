"""A model that is fine-tuned: an encoder with a head, of which all or some parameters learn, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgmae.checkpoints.cards import WeightsError
from medgmae.factory import create_model
from medgmae.losses import cox_loss, multilabel_loss
from medgmae.training.batches import CaseBatch
from medgmae.training.engine import Objective
from medgmae.training.optim import param_groups
from medgmae.training.settings import TrainingSettings, TuneSettings, TuningSettings
from medgmae.training.tables import TrainingError, expect
from medgmae.training.targets import Targets

# Linear layers of the blocks that tokens go through, of ViTs and of Vims.
_ADAPTED = r".*blocks\.\d+\.(.*\.)?(qkv|proj|fc1|fc2|in_proj|out_proj)"
_POOLING = ("head.", "fc_norm.", "attn_pool.")


class Tuned(nn.Module):
    """An encoder with a head, over one or several windows of a scan.

    Args:
        encoder: with a head.
        tuning: which of its parameters learn.
    """

    def __init__(self, encoder: Any, tuning: TuningSettings) -> None:
        super().__init__()
        self.encoder, self.tuning = encoder, tuning
        if tuning.encoder != "full":
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_(name.startswith(_POOLING))
        if tuning.encoder == "lora":
            _adapt(encoder, tuning)

    def forward(self, x: Tensor) -> Tensor:
        """Windows (B, K, C, D, H, W) to logits (B, outputs): pooled vectors are averaged over the windows."""
        batch, windows = x.shape[:2]
        encoder = self.encoder
        tokens = encoder.forward_features(x.flatten(0, 1))
        if windows == 1:
            return encoder.forward_head(tokens)  # type: ignore[no-any-return]
        if encoder.global_pool == "max_logit":
            return encoder.forward_head(tokens).unflatten(0, (batch, windows)).amax(1)  # type: ignore[no-any-return]
        pooled = encoder.forward_head(tokens, pre_logits=True).unflatten(0, (batch, windows)).mean(1)
        return encoder.head(pooled)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Tuned:
        """Training mode; of a frozen encoder only the head's."""
        super().train(mode)
        if mode and self.tuning.encoder == "frozen":
            self.encoder.eval()
            self.encoder.head.train()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.encoder.set_grad_checkpointing(enable)

    def merged(self) -> Any:
        """The encoder itself, with low-rank changes added to its weights. This model is of no use any more."""
        if self.tuning.encoder == "lora":
            _merge(self.encoder)
        return self.encoder


def tuned_model(settings: TuneSettings, outputs: int, pretrained: bool = True) -> Tuned:
    """The model that a run starts with; random weights are drawn by its seed.

    Raises:
        TrainingError: not an encoder, or one without pooling.
    """
    tuning = settings.tuning
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        source = settings.init if pretrained else None
        options = {**settings.model_options, "num_classes": outputs}
        try:
            encoder: Any = create_model(settings.model.partition(".")[0], pretrained=source, **options)
        except (ValueError, TypeError, WeightsError) as error:
            raise TrainingError(f"{settings.model}: {error}") from error
        known = hasattr(encoder, "forward_head") and len(encoder.patch_size) == 3
        expect(known, f"{settings.model} is not an encoder of volumes; expected vit_* or vim_*, with num_classes")
        expect(encoder.global_pool != "none", "model_options.global_pool is 'none', which gives no vector to classify")
        last = last_layer(encoder)
        nn.init.trunc_normal_(last.weight, std=tuning.head_std)
        nn.init.zeros_(last.bias)
        return Tuned(encoder, tuning)


def segmenter(settings: TuneSettings, outputs: int, pretrained: bool = True) -> nn.Module:
    """The UNETR that a run starts with; what its weights lack is drawn by the seed.

    Raises:
        TrainingError: not a UNETR of volumes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        source = settings.init if pretrained else None
        try:
            options = {**settings.model_options, "num_classes": outputs}
            model: Any = create_model(settings.model.partition(".")[0], pretrained=source, **options)
        except (ValueError, TypeError, WeightsError) as error:
            raise TrainingError(f"{settings.model}: {error}") from error
    known = hasattr(model, "decoder") and getattr(model, "TASK", "") == "image-segmentation"
    expect(
        known and len(model.patch_size) == 3 and model.slice_axis is None,
        f"{settings.model} does not segment volumes; expected unetr_vit_* or unetr_vim_* without a slice axis",
    )
    if settings.tuning.encoder == "frozen":
        model.encoder.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def last_layer(encoder: Any) -> nn.Linear:
    """The layer of a head that gives the outputs."""
    last = encoder.head[-1] if isinstance(encoder.head, nn.Sequential) else encoder.head
    assert isinstance(last, nn.Linear)
    return last


def _adapt(encoder: nn.Module, tuning: TuningSettings) -> None:
    """Add low-rank changes, of which the second factor begins at 0."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise TrainingError("tuning.encoder = 'lora' needs peft: pip install 'medgmae[lora]'") from error
    config = LoraConfig(r=tuning.lora_rank, lora_alpha=tuning.lora_alpha, target_modules=_ADAPTED)
    learning = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    inject_adapter_in_model(config, encoder)
    for name, parameter in encoder.named_parameters():  # peft stops all but its own
        parameter.requires_grad_(name in learning or ".lora_" in name)


def _merge(encoder: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    for name, module in list(encoder.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(encoder.get_submodule(parent), last, layer.get_base_layer())
    encoder.requires_grad_(True)
    if hasattr(encoder, "peft_config"):
        del encoder.peft_config


class Predict(Objective):
    """The loss of predictions: what an :class:`~medgmae.training.engine.Engine` minimises.

    Cross-entropy of classes; binary cross-entropy of the labels that are known; the squared error of numbers, in
    standard deviations of the training cases; Cox's partial likelihood.

    Args:
        targets: of all cases.
        training: settings of the run.
        weights: of the classes in the loss, or None.
        scale: mean and deviation of numbers.
    """

    def __init__(
        self, targets: Targets, training: TrainingSettings, weights: Tensor | None, scale: tuple[Tensor, Tensor] | None
    ) -> None:
        self.task, self.training, self.weights, self.scale = targets.task, training, weights, scale

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """Parameter groups of the encoder, with layer-wise rates where they are asked for."""
        training = self.training
        return param_groups(model.encoder, weight_decay=training.weight_decay, layer_decay=training.layer_decay)

    def __call__(self, model: nn.Module, part: CaseBatch, step: int) -> dict[str, Tensor]:
        """The loss alone."""
        return {"loss": self.loss(model(part.x).float(), part.targets)}

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of logits (B, outputs) and targets (B, T), a scalar."""
        task = self.task
        if task.kind == "survive":
            return cox_loss(logits[:, 0], targets[:, 0], targets[:, 1])
        if task.kind == "regress":
            assert self.scale is not None
            mean, deviation = (one.to(targets) for one in self.scale)
            return functional.mse_loss(logits, (targets - mean) / deviation)
        if task.multilabel:
            return multilabel_loss(logits, targets, smoothing=task.label_smoothing)
        weights = None if self.weights is None else self.weights.to(logits)
        return functional.cross_entropy(logits, targets[:, 0].long(), weights, label_smoothing=task.label_smoothing)

    def in_units(self, logits: Tensor) -> Tensor:
        """Logits (n, outputs), numbers in their own units."""
        return logits if self.scale is None else logits * self.scale[1] + self.scale[0]

    def rescale(self, encoder: Any) -> None:
        """Change the last layer of a head so that numbers come out in their own units."""
        if self.scale is None:
            return
        last = last_layer(encoder)
        mean, deviation = (one.to(last.weight) for one in self.scale)
        with torch.no_grad():
            last.weight.mul_(deviation[:, None])
            last.bias.mul_(deviation).add_(mean)


def class_weights(classes: Tensor, count: int) -> Tensor:
    """Inverse shares of classes (n,), (count,), with a mean of 1 over the cases."""
    found = torch.bincount(classes, minlength=count).clamp(min=1).float()
    return len(classes) / (count * found)


def probabilities(logits: Tensor, task: Any) -> Tensor:
    """What predictions are stated as: probabilities of classes, or the outputs themselves."""
    if task.kind != "classify":
        return logits
    return logits.sigmoid() if task.multilabel else logits.softmax(-1)


def columns_of(names: Sequence[str], task: Any) -> list[str]:
    """Names of the columns of predictions."""
    if task.kind == "classify":
        return [f"probability_{name}" for name in names]
    return ["risk"] if task.kind == "survive" else [f"predicted_{name}" for name in names]
