"""metrics.jsonl and TensorBoard of a run."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from bossnas.files import write_text


class Metrics:
    """Appends one JSON object a line to ``folder``/metrics.jsonl, and scalars to TensorBoard when it is installed.

    Opening drops the lines for which ``keep(line)`` is false: those that a resumed run will write again.
    """

    def __init__(self, folder: Path | None, keep=lambda line: True):
        self.file, self.board = None, None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _complete(line)]
            kept = [line for line in lines if keep(json.loads(line))]
            write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, block: int | None, step: int, **values: Any) -> None:
        """``step`` counts optimizer steps within the block; None: of a run without blocks. Values that are not finite
        become null."""
        if self.file is None:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        place = {} if block is None else {"block": block}
        self.file.write(json.dumps({"kind": kind, **place, "step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(
                        f"{kind}/{name}" if block is None else f"block_{block}/{kind}_{name}", value, step
                    )

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def _complete(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False  # the process was killed while it wrote this line
