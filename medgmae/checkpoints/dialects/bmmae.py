"""The dialect of BM-MAE: MONAI's names, a tokenizer for each MR sequence, sequence embeddings in the decoder.

The authors' own short way to load their file skips the tokenizers in silence, by other names. Here a sequence of the
model that the file has no tokenizer for is an error.
"""

from __future__ import annotations

import re

import torch

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import Converted, File, table_grid, take_decoder_table
from medgmae.checkpoints.dialects.monai import NORM_EPS, rename_monai
from medgmae.checkpoints.dialects.recognise import register_dialect

SOURCE = "BM-MAE"

# The order in which the authors' decoder has its sequences.
ORDER = ("t1", "t1ce", "t2", "flair")

_WEIGHT = re.compile(r"tokenizers\.(\w+)\.patch_embedding\.patch_embeddings\.weight")
_SEQUENCE = "decoder.modality_embeddings."
_NAMES = (
    ("decoder.decoder_embed.", "decoder.embed."),
    ("decoder.decoder_blocks.", "decoder.blocks."),
    ("decoder.decoder_norm.", "decoder.norm."),
    ("decoder.decoder_pred.", "decoder.head."),
    ("decoder.mask_tokens", "decoder.mask_token"),
)


@register_dialect(SOURCE, order=31, matches=lambda file: any(_WEIGHT.fullmatch(name) for name in file.names))
def convert_bmmae(file: File) -> Converted:
    """Encoder and decoder, for the sequences that the model has; without a model, for all in the file.

    Raises:
        WeightsError: a sequence of the model is missing, or the model has no stems by sequence.
    """
    held = [match[1] for name in file.names if (match := _WEIGHT.fullmatch(name))]
    held.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    sequences = _wanted(file, held)
    grid = _take_stems(file, sequences)
    for name in held:
        file.drop_all(f"tokenizers.{name}.", "stem of a sequence that the model does not have")
    _take_sequence_embeddings(file, sequences)
    rename_monai(file)
    if file.has("decoder.position_embeddings"):
        file.rename("decoder.position_embeddings", "decoder_pos_embed")
        take_decoder_table(file, 0)
    file.take_all(_place)
    return file.finish(SOURCE, grid, {"encoder.norm_eps": NORM_EPS, "encoder.sequences": sequences})


def _wanted(file: File, held: list[str]) -> list[str]:
    """The sequences of the model to be filled, all of which the file must have."""
    if file.target is None:
        return held
    wanted = file.target.settings.get("sequences")
    if not wanted:
        raise WeightsError(
            f"{file.origin}: has a patch embedding for each of the sequences {', '.join(held)}, the model has one for "
            f"all channels; use create_model('seqvit_base_patch16_128', sequences={held[:1]})"
        )
    missing = [name for name in wanted if name not in held]
    if missing:
        raise WeightsError(
            f"{file.origin}: has no patch embedding for {', '.join(map(repr, missing))}, only for {', '.join(held)}; "
            "build the model with sequences= of these"
        )
    return list(wanted)


def _take_stems(file: File, sequences: list[str]) -> tuple[int, ...]:
    """The stems side by side, and the one table that they share; returns its grid."""
    stems = [f"tokenizers.{name}.patch_embedding." for name in sequences]
    weights = [file.numbers(f"{stem}patch_embeddings.weight") for stem in stems]
    biases = [file.numbers(f"{stem}patch_embeddings.bias") for stem in stems]
    tables = [file.table(f"{stem}position_embeddings") for stem in stems]
    if len({tuple(weight.shape) for weight in weights}) > 1 or weights[0].dim() != 5 or weights[0].shape[1] != 1:
        shapes = sorted({tuple(weight.shape) for weight in weights})
        raise WeightsError(f"{file.origin}: the patch weights are {shapes}, expected one shape (width, 1, d, h, w)")
    if any(table.shape != tables[0].shape or not (table.is_meta or table.equal(tables[0])) for table in tables):
        raise WeightsError(f"{file.origin}: the sequences have different tables of positions, expected one for all")
    if {tuple(bias.shape) for bias in biases} != {weights[0].shape[:1]}:
        raise WeightsError(f"{file.origin}: the biases of the patches do not fit their weights; fetch the file again")
    grid, _ = table_grid(file, tables[0], 3, class_row=False)
    joined = {"patch_embeddings.weight": ("patch_embed.proj.weight", torch.cat(weights, dim=1))}
    joined["patch_embeddings.bias"] = ("patch_embed.proj.bias", torch.stack(biases))
    joined["position_embeddings"] = ("pos_embed", tables[0])
    for name, (ours, tensor) in joined.items():
        file.take(stems[0] + name, f"encoder.{ours}", tensor)
        for stem in stems[1:]:
            file.take_beside(stem + name, f"encoder.{ours}")
    return grid


def _take_sequence_embeddings(file: File, sequences: list[str]) -> None:
    """The decoder's embeddings of these sequences in a row; the others are left out."""
    if file.has_any(_SEQUENCE):
        names = [_SEQUENCE + name for name in sequences]
        rows = torch.cat([file.table(name) for name in names], dim=1)
        file.take(names[0], "decoder.sequence_embed", rows)
        for name in names[1:]:
            file.take_beside(name, "decoder.sequence_embed")
    file.drop_all(_SEQUENCE, "embedding of a sequence that the model does not have")


def _place(name: str) -> str | None:
    for theirs, ours in _NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None if name.startswith(("decoder.", "tokenizers.")) else f"encoder.{name}"
