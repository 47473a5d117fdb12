"""Help, the version and a mistake in a config are told without importing torch, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ranks import HANG, environment

pytestmark = pytest.mark.quick

PROGRAM = """
import sys
from bossnas.cli import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", *sorted({"torch", "numpy", "timm", "deepspeed"} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "Block-wise self-supervised"),
        (["--version"], 0, "0.1.0"),
        (["select", "--help"], 0, "RUN"),
        (["retrain", "--config", "no/such.yaml"], 2, "error: --config: cannot read no/such.yaml"),
        (["search", "--config", "configs/hytra_ds.json", "--set", "train.epoch=2"], 2, "did you mean 'epochs'"),
        (["plan", "--config", "configs/hytra_ds.json", "--set", "train.lr=-1"], 2, "error: train.lr: "),
        (["cost", "--config", "configs/hytra_ds.json", "--set", "space=3"], 2, "error: space: "),
        (["rate", "--untrained", "--config", "configs/hytra_ds.json", "--set", "seed=x"], 2, "error: seed: "),
    ],
)
def test_no_torch_before_there_is_work(project_root, arguments, code, said):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment() | {"COLUMNS": "120"},
        cwd=project_root,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == code and said in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "imported:"
