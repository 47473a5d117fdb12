"""Runs a search on one or many workers:

python launch/train.py --config configs/quickstart_ds.json
deepspeed launch/train.py --config configs/hytra_ds.json
"""

import os
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
paths = [str(root), str(root / "kernels")]  # launchers put only this folder on the path
sys.path[:0] = paths
os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)  # of loaders

from bossnas.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
