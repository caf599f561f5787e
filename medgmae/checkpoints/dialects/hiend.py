"""The dialect of Hi-End-MAE: timm's names, tables beside the encoder, a decoder with cross-attention."""

from __future__ import annotations

from medgmae.checkpoints.dialects.entries import PLAIN_TABLE, Converted, File, take_decoder_table
from medgmae.checkpoints.dialects.mae3d import take_encoder_table
from medgmae.checkpoints.dialects.recognise import register_dialect

SOURCE = "Hi-End-MAE"

# The blocks of the encoder that the published decoder reads, in the order of its cross-attention blocks.
TAPS = (9, 6, 3)

_NAMES = (
    ("mask_token", "decoder.mask_token"),
    ("encoder_to_decoder.3.", "decoder.embed."),  # of the encoder's last, normalised tokens
    ("encoder_to_decoder.2.", "decoder.bridges.0."),
    ("encoder_to_decoder.1.", "decoder.bridges.1."),
    ("encoder_to_decoder.0.", "decoder.bridges.2."),
    ("decoder.cross_attention_blocks.", "decoder.cross_blocks."),
)


@register_dialect(
    SOURCE,
    order=32,
    matches=lambda file: file.has("encoder_pos_embed") and file.has("encoder_to_decoder.0.weight"),
)
def convert_hiend(file: File) -> Converted:
    """Encoder and decoder of its pre-training."""
    grid, class_row = take_encoder_table(file)
    take_decoder_table(file, int(class_row))
    file.take_all(_place)
    return file.finish(SOURCE, grid, {"decoder.taps": TAPS}, PLAIN_TABLE)


def _place(name: str) -> str | None:
    for theirs, ours in _NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name.startswith(("encoder.", "decoder.")) else None
