"""The torch references as operators: what runs where there is no native module, or no kernel for a call.

A process of its own without medgmae._C, since what is registered with torch stays. The references must give what torch
is told beforehand, to the stride, or compiled code fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import warm_python

BEGIN = """
import sys; sys.modules["medgmae._C"] = None; sys.path.append("tests")
import warnings; warnings.simplefilter("ignore")
import torch
from sequences import FORMS, Inputs, arguments, make
from medgmae.ops import causal_conv1d, native_info, selective_scan, voxelize
assert not native_info()["loaded"]
ops = torch.ops.medgmae
ONLY = ("test_schema", "test_faketensor")  # of a backward, which has no derivative by design
def layouts(tensor):
    # As the public functions get them from tokens, contiguous as mamba-ssm has them, and repeated.
    if tensor is None or tensor.dim() < 3: return [tensor] * 3
    first = tensor[:, :1].expand_as(tensor)
    return [tensor, tensor.transpose(1, 2).contiguous().transpose(1, 2), first]
"""

SCAN = """
for forms in (FORMS[0], FORMS[4], FORMS[6]):
    given = arguments(make(2, 6, 70, 3, forms=forms))
    for layout in range(3):
        tensors = [layouts(t)[layout] for t in given]
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(ops.selective_scan.default, (*leaves, True, False, 64))
        out, states = ops.selective_scan(*tensors, True, False, 64)
        grad = layouts(torch.randn_like(out))[layout]
        rest = (*tensors, True, False, 64)
        torch.library.opcheck(ops.selective_scan_backward.default, (grad, None, states, *rest), test_utils=ONLY)
        torch.library.opcheck(ops.selective_scan_backward.default, (grad, states, states, *rest), test_utils=ONLY)
bare = arguments(make(2, 6, 9, 3, without=("D", "z", "delta_bias")))
out, states = ops.selective_scan(*bare, False, True, 4)
torch.library.opcheck(ops.selective_scan_backward.default, (out, None, states, *bare, False, True, 4), test_utils=ONLY)
"""

CONVOLUTION = """
for layout in range(3):
    x, grad = (layouts(torch.randn(2, 9, 6))[layout] for _ in range(2))
    weight, bias = torch.randn(6, 4), torch.randn(6)
    for silu, own in ((True, bias), (False, None)):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, own)]
        torch.library.opcheck(ops.causal_conv1d.default, (*leaves, silu, False))
        torch.library.opcheck(ops.causal_conv1d_backward.default, (grad, x, weight, own, silu, True), test_utils=ONLY)
"""

VOXELS = """
for batch in (1, 2):
    scales, turns = 0.1 + 0.1 * torch.rand(batch, 5, 3), torch.randn(batch, 5, 4)
    gaussians = [torch.rand(batch, 5, 3), scales, turns, torch.rand(batch, 5)]
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in gaussians]
    for tensors in (gaussians, turned):
        options = torch.zeros(batch, 1, dtype=torch.int64), (6, 7, 8), (6, 7, 8), 3.0
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(ops.voxelize.default, (*leaves, *options))
        out = ops.voxelize(*tensors, *options)
        for grad in (torch.randn_like(out), torch.ones(()).expand_as(out)):
            torch.library.opcheck(ops.voxelize_backward.default, (grad, *tensors, *options), test_utils=ONLY)
"""

COMPILED = """
def loss(weight, *tensors):
    inputs = Inputs(*tensors)
    inputs = inputs._replace(u=causal_conv1d(inputs.u, weight, activation="silu"))
    out, state = selective_scan(*inputs, delta_softplus=True, return_last_state=True)
    return out.square().mean() + state.square().mean()
compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
for forms in (FORMS[1], FORMS[2]):
    inputs = make(2, 6, 70, 3, forms=forms)
    for change in (lambda t: t, torch.Tensor.contiguous):
        sets = [[torch.ones(6, 4).double().requires_grad_(), *inputs.map(change).leaves()] for _ in range(2)]
        found, wanted = (torch.autograd.grad(f(*t), t) for f, t in zip((compiled, loss), sets))
        for got, exact in zip(found, wanted): torch.testing.assert_close(got, exact)
"""


@pytest.mark.parametrize("script", [SCAN, CONVOLUTION, VOXELS, COMPILED], ids=["scan", "conv", "voxelize", "compiled"])
def test_results_and_gradients_are_what_torch_is_told(script: str) -> None:
    done = warm_python.run("-c", BEGIN + script, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
