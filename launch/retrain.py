"""Trains a network on one or many workers:

python launch/retrain.py --config configs/bossnet_cifar10.yaml
torchrun --nproc-per-node 8 launch/retrain.py --config configs/bossnet_t0_imagenet.yaml
deepspeed launch/retrain.py --config configs/bossnet_t0_imagenet.yaml --set engine.name=deepspeed
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
    main(["retrain", *sys.argv[1:]])
