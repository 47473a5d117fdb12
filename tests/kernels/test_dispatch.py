"""Which implementation runs, and that the public functions reach it."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bossnas_kernels
from bossnas_kernels import augment_reference, common, dispatch, reference


@pytest.fixture(autouse=True)
def auto():
    yield
    bossnas_kernels.use("auto")


@pytest.mark.quick
def test_auto_runs_the_reference_on_cpu():
    assert bossnas_kernels.implementation("cpu") == "reference"
    assert bossnas_kernels.implementation(torch.device("cuda")) == ("reference" if common.INTERPRET else "triton")


@pytest.mark.quick
def test_the_choice_is_kept(device):
    bossnas_kernels.use("triton")
    assert bossnas_kernels.implementation(device) == "triton"
    bossnas_kernels.use("reference")
    assert bossnas_kernels.implementation(device) == "reference"


@pytest.mark.quick
def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="kernels: expected one of auto, triton, reference, got 'fast'"):
        bossnas_kernels.use("fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(common, "INTERPRET", False)
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, or TRITON_INTERPRET=1.*; choose auto"):
        bossnas_kernels.use("triton")
    assert bossnas_kernels.implementation("cpu") == "reference", "a refused choice changes nothing"


def test_without_triton_the_reference_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, bossnas_kernels as k\n"
        "assert k.implementation('cuda') == 'reference'\n"
        "y, _, _ = k.gbn_act(torch.randn(4, 3), torch.ones(3), torch.zeros(3), groups=2)\n"
        "try: k.use('triton')\n"
        "except ValueError as e: assert 'triton is not installed' in str(e); print('said so')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=common.__file__.rpartition("/bossnas_kernels/")[0],
    )
    assert done.stdout == "said so\n", done.stderr


# Small calls of every public function; the first argument decides dtype and device.
def calls(device, dtype):
    def draw(*size):
        return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(device, dtype)

    x = draw(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, bias, kernel = torch.ones(16, device=device), torch.zeros(16, device=device), draw(16, 1, 3, 3)
    qkv = draw(2, 96, 4, 4).contiguous(memory_format=torch.channels_last)
    return {
        "gbn_act": lambda m: m.gbn_act(x, weight, bias, groups=2, act="relu"),
        "dwconv2d": lambda m: m.dwconv2d(x, kernel),
        "dwconv2d_stats": lambda m: m.dwconv2d_stats(x, kernel, groups=2),
        "mhsa2d": lambda m: m.mhsa2d(qkv, 2),
        "mhsa2d_stats": lambda m: m.mhsa2d_stats(qkv, 2, groups=2),
        "byol_ensemble_loss": lambda m: m.byol_ensemble_loss(draw(2, 4, 8), draw(3, 4, 8)),
    }


NAMES = list(calls("cpu", torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_runs_and_agrees(device, name, monkeypatch):
    call = calls(device, torch.float32)[name]
    want = call(reference)
    monkeypatch.setattr(reference, name, None)  # calling it fails
    bossnas_kernels.use("triton")
    got = call(bossnas_kernels)
    first = (t[0] if isinstance(t, tuple) else t for t in (got, want))
    torch.testing.assert_close(*first, rtol=1e-5, atol=1e-5)
    if name.endswith("_stats"):
        assert got[1] is not None and want[1] is None


@pytest.mark.parametrize("name", NAMES)
def test_float64_goes_to_the_reference_and_that_is_said_once(device, name, caplog):
    call = calls(device, torch.float64)[name]
    bossnas_kernels.use("triton")
    common._told.clear()
    with caplog.at_level(logging.INFO, "bossnas_kernels"):
        got, again = call(bossnas_kernels), call(bossnas_kernels)
    want = call(reference)
    for g in (got, again):
        torch.testing.assert_close(g, want, rtol=0, atol=0)
    assert caplog.messages == [f"{name.removesuffix('_stats')}: torch.float64 tensors are computed by the reference"]


@pytest.mark.parametrize("name", ["dwconv2d", "mhsa2d"])
def test_autocast_chooses_the_dtype(name):
    call = calls("cpu", torch.float32)[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(bossnas_kernels).dtype == torch.bfloat16
    assert call(bossnas_kernels).dtype == torch.float32


@pytest.mark.parametrize("gpus, current, switched", [(1, 0, False), (2, 1, False), (2, 0, True)])
def test_launches_are_on_the_gpu_of_the_first_argument(gpus, current, switched, monkeypatch):
    x = SimpleNamespace(is_cuda=True, get_device=lambda: gpus - 1)
    monkeypatch.setattr(common, "_gpus", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    guard = common.on_device_of(x)
    assert (guard.idx == 1) if switched else (guard is common._HERE)
    assert common.on_device_of(torch.ones(1)) is common._HERE


def test_every_public_function_has_a_reference():
    functions = set(bossnas_kernels.__all__) - {"use", "implementation", "Looks"}
    assert all(callable(getattr(reference, name, None) or getattr(augment_reference, name)) for name in functions)
    assert all(getattr(dispatch, name).__doc__ for name in functions)
