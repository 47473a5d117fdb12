"""Kernels' tests: natively on a GPU, in Triton's interpreter elsewhere. The choice comes before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

ON_GPU = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
_too_late = not ON_GPU and "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret
if not ON_GPU and not _too_late:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_aot.py")  # last: see `compilers`
    if _too_late:
        reason = "triton was imported before its interpreter was chosen: run tests/kernels in a process of its own"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def compilers(request, tmp_path_factory):
    """For test_aot.py: a compiling process for every target, at work beside the other tests; none if it is not run.

    They do without the interpreter, which this process may run under.
    """
    if not any(item.path.name == "test_aot.py" for item in request.session.items):
        yield None
        return
    folder, script = tmp_path_factory.mktemp("aot"), Path(__file__).with_name("aot.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    running = {}
    for target in ("sm_80", "sm_90", "gfx942"):
        with open(folder / f"{target}.txt", "w") as log:
            running[target] = subprocess.Popen(
                [sys.executable, script, target, "--json", folder / f"{target}.json"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    yield folder, running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN, so that reading what was never written shows."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def new_plans():
    """Plans are made anew for every test: many replace a row of a table."""
    from bossnas_kernels import common

    common.forget()


@pytest.fixture
def device():
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # else float32 convolutions around a kernel are not float32
    return torch.device("cuda" if ON_GPU and torch.cuda.is_available() else "cpu")
