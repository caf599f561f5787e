"""Kernels in processes that were forked after the parent had used them with several threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from medgmae.ops import native_info

if not native_info()["loaded"] or native_info()["openmp"] is None or sys.platform != "linux":
    pytest.skip("threads of the native kernels need OpenMP, and DataLoader forks on Linux", allow_module_level=True)

# The scan, the convolution and the renderer. Autograd refuses to run in a fork of a process that has used it, and
# torch's own operators hang there on large tensors, so neither is asked for anything.
KERNELS = """
import hashlib
import multiprocessing
import torch
from torch.utils.data import DataLoader, Dataset
import medgmae
from medgmae.ops import causal_conv1d, native, selective_scan

def random(*size):
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))

x, A, B, weight = random(1, 256, 100), -random(256, 16), random(1, 16, 100), random(256, 4)
gaussians = medgmae.Gaussians(random(1, 256, 3), random(1, 256, 3) / 10, random(1, 256, 4), random(1, 256))

@torch.no_grad()
def kernels():
    results = selective_scan(x, x, A, B, B), causal_conv1d(x, weight), medgmae.GaussianRenderer()(gaussians, (48,) * 3)
    return [hashlib.sha1(result.numpy().tobytes()).hexdigest() for result in results]

class Items(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return kernels()

def child(queue):
    queue.put((native.threads(), torch.get_num_threads(), kernels()))

torch.set_num_threads(4)
assert native.threads() == 4
before = kernels()
"""


def python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERNELS + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_workers_of_a_data_loader() -> None:
    python("""
for batch in DataLoader(Items(), num_workers=2, multiprocessing_context="fork", collate_fn=list):
    assert batch == [before], batch
""")


def test_a_forked_process_that_does_not_set_its_threads() -> None:
    """DataLoader sets torch's threads to 1 in its workers; a plain fork keeps the parent's number."""
    python("""
fork = multiprocessing.get_context("fork")
queue = fork.Queue()
process = fork.Process(target=child, args=(queue,), daemon=True)
process.start()
ours, torchs, values = queue.get(timeout=30)
process.join()
assert (ours, torchs) == (1, 4), (ours, torchs)
assert values == before
assert native.threads() == 4  # the parent goes on as before
""")
