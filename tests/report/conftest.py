from __future__ import annotations

import json

import made_run
import pytest
from made_run import EVIL

SPACE = """
import importlib.util, pathlib
from bossnas.spaces import Words
from bossnas.spaces.nats import Nats

class Own(Nats):
    def candidates(self, block):
        return [EVIL + name for name in super().candidates(block)]

    def words(self, block, layer, choice):
        return Words(EVIL + str(choice), row=EVIL + str(choice), kind=EVIL)
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return made_run.make(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A run with markup in every name that it can hold."""
    base = tmp_path_factory.mktemp("hostile")
    (base / "own.py").write_text(f"EVIL = {EVIL!r}\n{SPACE}")
    folder = made_run.make(
        base / EVIL.replace("/", "_").replace("\x0b", ""),
        [f"space.name={base}/own.py:Own", "space.image_size=32", "space.width=0.25"],
        scores={"population_centre": "lower", EVIL: "higher"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["data"].update(train=EVIL, val=[EVIL])
    config["engine"]["deepspeed"] = {EVIL: EVIL}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "versions.json").write_text(json.dumps({"kind": "search", EVIL: EVIL, "torch": [EVIL]}))
    log = EVIL.replace("\x0b", "")
    (folder / "log.txt").write_text(
        f"2026-12-01 10:00:00,123 WARNING {log}\n2026-12-01 10:00:01,123 ERROR {log}\nno {log}\n"
    )
    with (folder / "metrics.jsonl").open("a") as file:
        for line in ({"kind": EVIL}, {"kind": "rating", "block": 0, "step": 3, "best": 1.0, "path": EVIL},
                     {"kind": "train", "block": EVIL, "step": EVIL, "loss": EVIL}, [EVIL]):  # fmt: skip
            file.write(json.dumps(line) + "\n")
        file.write('{"kind": "train", "block": 0, "st')
    return folder
