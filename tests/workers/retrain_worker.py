"""One rank of retrain/test_train_ranks.py: retrainings and evaluations one after the other.

Arguments: JSON list of jobs: sets (of a config) with resume, or evaluate (a run folder) with sets of its reader; out (a
JSON file) gets the evaluation's result, the warnings and what the networks of the ranks are.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from ranks import HANG

from bossnas.config.loading import load
from bossnas.config.retrain import RetrainConfig
from bossnas.config.shared import ReaderConfig
from bossnas.distributed import dist, launch
from bossnas.networks import pretrained
from bossnas.retrain import evaluate
from bossnas.retrain.train import retrain


def work(job: dict) -> None:
    if "evaluate" in job:
        network = pretrained.open_network(Path(job["evaluate"]))
        result = evaluate.evaluate_network(
            network, ReaderConfig(workers=0, val_images=job["val_images"]), batch=20, device="cpu"
        )
        everyone = dist.all_gather_object([result.images, result.top1, result.top5, result.loss])
        if dist.rank() == 0:
            Path(job["out"]).write_text(json.dumps(everyone), encoding="utf-8")
        return
    if "copy" in job and dist.rank() == 0:
        shutil.copytree(job["copy"], job["to"])
    dist.barrier()
    retrain(load(None, job["sets"], RetrainConfig), job.get("resume"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    argument = next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))
    jobs = json.loads(argument)
    sys.exit(launch.run(lambda: [work(job) for job in jobs], timeout_minutes=HANG / 60))
