"""Where a run begins: anew, at its own last checkpoint, at one of its own before that, or at one of another run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from bossnas.config.search import Config
from bossnas.config.shared import RunConfig
from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.log import logger
from bossnas.runs import checkpoint
from bossnas.runs.folder import check_same, claim_folder

FIX = "give auto, the folder RUN of a run, or RUN/checkpoints/NAME"


def claim(config: RunConfig, resume: str | None) -> Path | None:
    """Checks that the run may be in its folder, and changes nothing. Returns the checkpoint from which `begin_at` has
    to make it begin, None if it begins anew or at its own last one.

    ``resume``: None: the folder must hold no run; "auto": it may; else the path of a run or of a checkpoint, from which
    the run goes on in its own folder. Raises ConfigError where that cannot be.
    """
    if resume is None or resume == "auto":
        claim_folder(config, resume == "auto")
        return None
    path, out = Path(resume), Path(config.out)
    run, where = _named(path)
    if run.resolve() == out.resolve():
        claim_folder(config, resume=True)
        return where
    check_same(run, config, "resume")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "out",
            f"{out} is not empty, but a run is to begin there from {path}",
            "choose another folder with `out`; what is in this one goes on with `resume` auto",
        )
    return where


def begin_at(config: Config, where: Path) -> None:
    """Leaves the run's folder as it was when checkpoint ``where`` was written: its own, or another run's that is copied
    together with the results so far."""
    out, source = Path(config.out), where.parent.parent
    state = checkpoint.read_state(where)
    if source.resolve() == out.resolve():
        go_back(where, ("done", "architecture.json"))
        for file in (out / "ratings").glob("block_*"):
            if not _was_there(file.name, state, config):
                file.unlink()
        _write_winners(out, state)
        return
    try:
        (out / "ratings").mkdir(parents=True, exist_ok=True)
        for file in (source / "ratings").glob("block_*.json"):
            if _was_there(file.name, state, config):
                shutil.copy(file, out / "ratings")
        if (source / "metrics.jsonl").exists():  # the lines after the checkpoint are dropped when it is opened
            shutil.copy(source / "metrics.jsonl", out)
        _write_winners(out, state)
        # last: config.json comes after it (`prepare_folder`), and what is cut before that is no run and is refused
        checkpoint.copy(where, out / "checkpoints")
    except OSError as error:
        raise ConfigError(
            "resume",
            f"{where} cannot be copied to {out} ({error.strerror or error})",
            "make room, or choose another folder, and begin again with an empty one",
        ) from None
    logger.info("%s begins from checkpoint %s", out, where)


def go_back(where: Path, results: Sequence[str]) -> None:
    """Leaves a run as it was at its checkpoint ``where``: without its ``results`` and the newer checkpoints."""
    out = where.parent.parent
    # results first: a run that is killed in between goes on, while one that has "done" would count as finished
    for name in results:
        (out / name).unlink(missing_ok=True)
    if removed := checkpoint.rewind(where):
        logger.info("%s: going back to checkpoint %s, newer ones are removed: %s", out, where.name, ", ".join(removed))


def _named(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that ``path`` means."""
    if (path / "config.json").exists():
        where = checkpoint.latest(path / "checkpoints")
        if where is None:
            raise ConfigError("resume", f"{path} has no checkpoint", FIX)
        return path, where
    run = path.parent.parent
    if path.resolve().parent.name != "checkpoints" or not (run / "config.json").exists():
        raise ConfigError("resume", f"{path} is neither a run nor a checkpoint of one", FIX)
    if (damage := checkpoint.find_damage(path)) is not None:
        raise ConfigError("resume", f"checkpoint {path} is unusable: {damage}", "name another one of that run")
    return run, path


def _was_there(name: str, state: dict, config: Config) -> bool:
    """Whether the rating file ``name`` was written before the checkpoint with that state. A rating in mid-stage comes
    after the checkpoint of its step."""
    found = re.fullmatch(r"block_(\d+)(?:_epoch_(\d+))?\.json", name)
    if found is None:
        return False
    block, epoch = int(found[1]), found[2]
    if block < state["block"]:
        return True
    steps = config.train.steps_per_epoch or state["data"]["images"] // config.train.batch
    trained = block == state["block"] or config.schedule == "block_parallel"
    return epoch is not None and trained and int(epoch) * steps < state["step"]


def _write_winners(out: Path, state: dict) -> None:
    if state["winners"]:
        write_json(out / "winners.json", {"winners": state["winners"]})
    else:
        (out / "winners.json").unlink(missing_ok=True)


def check_data(saved: dict, now: dict, within_block: bool) -> None:
    """Raises ConfigError where the images would not go on in the order in which the run began."""
    if saved["images"] != now["images"]:
        raise ConfigError(
            "data.train",
            f"has {now['images']} images, but the run began with {saved['images']}",
            "give it the shards it began with, or start a new run",
        )
    if saved["readers"] != now["readers"] and within_block:
        raise ConfigError(
            "data.workers",
            f"streams are read by {now['readers']} readers (ranks x workers), but the "
            f"run was stopped with {saved['readers']}",
            "use as many, or data.reader=index on local shards, which any number may read",
        )
