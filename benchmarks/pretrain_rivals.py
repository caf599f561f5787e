"""The steps of pretrain.py's models in plain torch, on the modules of MONAI and timm.

Each function takes a model of this library and returns another way to its loss, a callable of crops and masking. Both
have the same Parameter objects, so that they stay equal while either is trained, and memory holds them once.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_renderer import SliceLoopRenderer

import medgmae
from medgmae import Masking, patchify

Loss = Callable[[Tensor, Masking], Tensor]
# Of MONAI's modules, in this library's words.
MONAI_NAMES = (
    ("patch_embedding.patch_embeddings", "encoder.patch_embed.proj"),
    ("patch_embedding.position_embeddings", "encoder.pos_embed"),
    ("cls_token", "encoder.cls_token"),
    ("mask_tokens", "decoder.mask_token"),
    ("decoder_embed", "decoder.embed"),
    ("decoder_pos_embedding", "decoder.pos_embed"),
    ("decoder_pred", "decoder.head"),
    ("decoder_blocks.8.", "decoder.norm."),
    ("decoder_blocks", "decoder.blocks"),
    ("blocks.12.", "encoder.norm."),
    ("blocks", "encoder.blocks"),
)
MONAI_LAYERS = (("out_proj", "proj"), ("linear1", "fc1"), ("linear2", "fc2"))


def monai_mae(model: Any) -> Loss:
    """MONAI's MaskedAutoEncoderViT of the sizes of mae_vit_base_patch16_96, whose epsilon must be MONAI's 1e-5.

    The loss is that of the model's recipe: each true patch normalised by its own mean and biased variance, the mean
    over hidden patches. MONAI draws its masks itself; here they are the batch's.
    """
    from monai.networks.nets import MaskedAutoEncoderViT

    class Masked(MaskedAutoEncoderViT):  # type: ignore[misc]
        masking: Masking

        def _masking(self, x: Tensor, masking_ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
            keep = self.masking.keep
            return x[torch.arange(len(x)).unsqueeze(1), keep], keep, self.masking.mask

    net = Masked(1, 96, 16, 768, 3072, 12, 12, 0.75, 384, 1536, 8, 12, qkv_bias=True).to(model.encoder.pos_embed.device)
    own = dict(model.named_parameters())
    taken = {name: own[ours] for name in net.state_dict() if (ours := _in_our_words(name)) in own}
    left = net.load_state_dict(taken, strict=False, assign=True)
    unused = set(own) - set(map(_in_our_words, taken))  # a table of zeros
    if unused != {"decoder.prefix_pos_embed"} or any("norm_cross_attn" not in name for name in left.missing_keys):
        raise SystemExit(f"this MONAI has other parameters: {left}, {unused}")

    def loss(x: Tensor, masking: Masking) -> Tensor:
        net.masking = masking
        predicted, mask = net(x)
        target = patchify(x, 16)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=0)
        target = (target - mean) / (variance + 1e-6).sqrt()
        return ((predicted - target).square().mean(-1) * mask).sum() / mask.sum()

    return loss


def _in_our_words(name: str) -> str:
    for theirs, ours in MONAI_NAMES:
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
            break
    for theirs, ours in MONAI_LAYERS:
        name = name.replace(theirs, ours)
    return name


def timm_blocks(blocks: nn.ModuleList) -> nn.ModuleList:
    """timm's, with the parameters of ours."""
    from timm.models.vision_transformer import Block

    made = nn.ModuleList()
    for own in blocks:
        block: Any = own
        norm = functools.partial(nn.LayerNorm, eps=block.norm1.eps)
        ratio = block.mlp.fc1.out_features / block.mlp.fc1.in_features
        with torch.device("meta"):
            other = Block(block.mlp.fc1.in_features, block.attn.num_heads, ratio, qkv_bias=True, norm_layer=norm)
        other.load_state_dict(dict(block.named_parameters()), assign=True)
        made.append(other)
    return made


def gaussian_mae(model: Any) -> Loss:
    """A Gaussian autoencoder as one writes it: all patches embedded by a convolution, timm's blocks in encoder and
    decoder, the whole volume rendered by a loop over Gaussians on the slices of their boxes (the fastest torch renderer
    that we know), masked mean squared error. The decoder's queries and heads are this library's plain torch.
    """
    encoder: Any = model.encoder
    convolution, norm, blocks = encoder.patch_embed.proj, encoder.norm, timm_blocks(encoder.blocks)
    decoder: Any = copy.deepcopy(model.decoder, {id(p): p for p in model.decoder.parameters()})
    decoder.blocks = timm_blocks(decoder.blocks)
    render = SliceLoopRenderer()

    def loss(x: Tensor, masking: Masking) -> Tensor:
        tokens = convolution(x).flatten(2).transpose(1, 2) + encoder.pos_embed
        tokens = tokens[torch.arange(len(x), device=x.device).unsqueeze(1), masking.keep]
        tokens = torch.cat([encoder.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        for block in blocks:
            tokens = block(tokens)
        volume = render(decoder(norm(tokens)), x.shape[2:])
        hidden = masking.mask.reshape(len(x), 1, *encoder.grid_size)
        hidden = F.interpolate(hidden, scale_factor=[float(p) for p in encoder.patch_size])
        return ((volume - x).square() * hidden).sum() / hidden.sum()

    return loss


def reference_scan(model: Any) -> Loss:
    """The model itself, scans and convolutions by this library's torch references: no Mamba for CPUs exists elsewhere.

    The references are what runs at the time of forward and backward, see :func:`medgmae.ops.use_native`.
    """

    def loss(x: Tensor, masking: Masking) -> Tensor:
        value: Tensor = model(x, masking).loss
        return value

    return loss


RIVALS: dict[str, Callable[[Any], Loss]] = {
    "MONAI's MaskedAutoEncoderViT": monai_mae,
    "timm's blocks, Gaussians rendered in a loop over slices": gaussian_mae,
    "the same model with the scan's torch reference": reference_scan,
}


def product_rate() -> float:
    """GFLOP/s of torch's product of 129 tokens with weights, 1536 to 6144 wide, that no cache holds."""
    x, weights = torch.rand(129, 1536), torch.rand(8, 6144, 1536)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - begin)
    return 2e-9 * 129 * weights.numel() / best


def in_place_rate() -> float:
    """GB/s of a tensor that is changed in place by another, as weights and moments are: two read, one written."""
    a, b = torch.rand(96_000_000), torch.rand(96_000_000)
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        a.add_(b)
        best = min(best, time.perf_counter() - begin)
    return 3 * 4e-9 * len(a) / best


def native_for(name: str) -> Any:
    """The context that a rival's forward and backward run in."""
    return medgmae.ops.use_native(RIVALS[name] is not reference_scan)
