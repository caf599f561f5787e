"""What else may lie in the place of a checkpoint, known by its first bytes: each has a remedy of its own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

HEAD = 512  # bytes of a file that are looked at

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began its files before 1.6
_ZIP = b"PK\x03\x04"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
_FRAMEWORKS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes them",
    b"\x93NUMPY": "an array of numpy",
    b"GGUF": "a GGUF file",
}
_CONVERT = "read it with the library that wrote it, and save a dictionary of torch tensors by name with torch.save"


def is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file is to be read as safetensors: its content decides, its name where that says nothing."""
    return head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith((_ZIP, _LEGACY)))


def foreign(head: bytes) -> str:
    """What a file is, and what to do, if its first bytes are not those of a checkpoint; "" if they may be."""
    if head[8:9] == b"{":  # safetensors: what stands before is a length, which may look like anything
        return ""
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself; run 'git lfs pull' where it comes from"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights: an error or a log-in; open its address in a browser and fetch the file"
    if kind := next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), ""):
        return f"is compressed ({kind}); unpack it, and load what is inside"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it (one of torch 0.1 is loaded by torch of its time and saved again)"
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        return f"is an ONNX model; {_CONVERT}"
    kind = next((kind for magic, kind in _FRAMEWORKS.items() if head.startswith(magic)), "")
    return f"is {kind}; {_CONVERT}" if kind else ""


def foreign_zip(names: Collection[str]) -> str:
    """The same for a zip file, by the names in it."""
    if any(name.endswith("/constants.pkl") for name in names):
        return "is a TorchScript archive; load it with torch.jit.load and save its state_dict() with torch.save"
    if any(name.rpartition("/")[2] == "archive_format" for name in names):
        return "is a program of torch.export; load it with torch.export.load and save its state_dict with torch.save"
    if names and all(name.endswith(".npy") for name in names):
        return f"is an archive of numpy arrays; {_CONVERT}"
    if any(name.endswith(".weights.h5") for name in names):
        return f"is a model of Keras; {_CONVERT}"
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "is a zip archive without the data.pkl of torch.save; unpack it, and load the weight file inside"
    return ""


def begins_as_text(head: bytes) -> str:
    """The first words of a file that is text and no checkpoint; "" for other files."""
    text = head[:60].decode("utf-8", errors="ignore")
    readable = len(head) > 3 and all(char.isprintable() or char in "\t\r\n" for char in text)
    return " ".join(text.split())[:40] if readable else ""
