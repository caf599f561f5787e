"""Checks the medgmae that this interpreter has installed; build_wheels.sh runs it in clean environments.

python check_wheel.py [--cuda]      --cuda: the wheel must have the CUDA half
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import medgmae
from medgmae.ops import native_info, self_test


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process: a second one has threads of its own, and waiting threads of both spin."""
    files = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(name for name in files if re.match(r"lib(gomp|omp|iomp5)\b", Path(name).name))


def main() -> None:
    """Run the operators and a model, and look at what was loaded for that."""
    torch.set_num_threads(2)
    info = native_info()
    assert info["loaded"], info["error"]
    assert "site-packages" in medgmae.__file__, f"not the installed package: {medgmae.__file__}"
    assert info["version"] == medgmae.__version__ == version("medgmae"), info
    if "--cuda" in sys.argv:
        assert info["cuda"] is not None, info["cuda_missing"]
        assert info["cuda"]["architectures"][-1].endswith("+PTX"), info
    errors = self_test()
    with torch.inference_mode():
        features = medgmae.create_model("vit_nano_patch8_32").eval()(torch.zeros(1, 1, 32, 32, 32))
    assert features.isfinite().all()
    runtimes = openmp_runtimes()
    assert len(runtimes) == 1, f"expected torch's OpenMP runtime alone, found {runtimes}"
    cuda = info["cuda"] and f"CUDA {info['cuda']['version']} for {' '.join(info['cuda']['architectures'])}"
    sys.stdout.write(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}: {len(errors)} native paths differ from torch by "
        f"{max(errors.values()):.1e} at most; {cuda or 'no CUDA half'}; OpenMP: {runtimes[0].rsplit('/', 1)[-1]}\n"
    )


if __name__ == "__main__":
    main()
