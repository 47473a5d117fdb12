"""`bossnas cost`: costs of a space, with the latency of every `CostTable` entry measured on the present device."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bossnas import spaces
from bossnas.config.shared import SpaceConfig
from bossnas.distributed import dist
from bossnas.errors import ConfigError
from bossnas.layout import Column, both, brief, paragraph, table
from bossnas.log import progress
from bossnas.spaces import ops
from bossnas.spaces.cost import CostTable, Key, Shape, call_stem, read_architecture

WARM_UP = 2  # calls that are not timed: they allocate and choose algorithms
LONGEST = 1e9  # ms; sums of more would leave the 64-bit integers of nanoseconds
STEM = None  # stands for the stem where the others have their key


def report(
    space_config: SpaceConfig,
    architecture: str | None = None,
    *,
    measured: bool = False,
    batch: int = 1,
    repeats: int = 30,
    threads: int | None = None,
) -> dict[str, Any]:
    """The cost of one architecture, or the space's whole table ("rows"), as plain values ready for JSON.

    ``measured`` adds latencies to the table, and where they were taken. Raises ConfigError for what the user can mend.
    """
    space = spaces.make(**space_config.model_dump())
    chosen = None if architecture is None else read_architecture(space, architecture)
    table = CostTable.of(space, space_config.image_size)
    result: dict[str, Any] = {"space": space_config.model_dump(mode="json")}
    if chosen is not None:
        return {**result, "architecture": architecture, **table.network(chosen), "describe": space.describe(chosen)}
    if not measured:
        return {**result, "rows": table.rows()}
    device = dist.device()
    if threads is not None:
        torch.set_num_threads(threads)
    kernels = ops.use_kernels("auto", device)
    with progress("latencies", space.blocks) as task:
        rows = measure(table, batch=batch, repeats=repeats, device=device, advance=task.advance)
    return {
        **result,
        "device": machine(device),
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "torch": torch.__version__,
        "batch": batch,
        "repeats": repeats,
        "rows": rows,
    }


def lines(result: dict[str, Any], space: int) -> list[str]:
    """The result of `report` as text of at most ``space`` columns."""
    if "rows" not in result:
        return paragraph(
            f"{result['architecture']}: {both(result['macs'])} multiply-adds, {both(result['params'])} parameters",
            space,
            "  ",
        )
    rows = result["rows"]
    title = f"Candidates of {result['space']['name']} at width {result['space']['width']:g}, of one image"
    places = [
        Column(heading, ["" if row[key] is None else str(row[key]) for row in rows], text=True)
        for heading, key in (("block", "block"), ("layer", "layer"), ("id", "candidate"))
    ]
    columns = [
        *places,
        Column("candidate", [row["name"] for row in rows], text=True),
        *(Column(key, ["x".join(map(str, row[key])) for row in rows]) for key in ("input", "output")),
        Column("multiply-\nadds", [brief(row["macs"]) for row in rows]),
        Column("para-\nmeters", [brief(row["params"]) for row in rows]),
    ]
    if "batch" in result:
        title += f"; latency of a batch of {result['batch']} on {result['device']}"
        columns.append(Column("latency", [f"{row['latency_ms']:,.3f} ms" for row in rows]))
    return table(title, columns, space, names=4)


@torch.no_grad()
def measure(
    table: CostTable, *, batch: int, repeats: int, device: torch.device, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """The table's rows with the latency of a batch: "latency_ms" (the median), "latency_p10_ms", "latency_p90_ms".

    Evaluation mode, fp32, channels_last, random inputs. One block's weights are in memory at a time; its candidates
    take turns in random order, ``repeats`` times, so that a busy moment of the machine falls on all of them alike.
    ``advance`` is called once per block.
    """
    stem = table.space.stem().eval().to(device)
    times: dict[Key | None, list[int]] = interleaved(
        {STEM: _call(lambda x: call_stem(stem, x), table.image, batch, device)}, repeats, device
    )
    for block in range(table.space.blocks):
        layers = [table.space.layer(block, layer).eval().to(device) for layer in range(table.space.layers(block))]
        calls = {
            (b, layer, choice, shape): _call(_candidate(layers[layer], choice), shape, batch, device)
            for b, layer, choice, shape in table.entries
            if b == block
        }
        times.update(interleaved(calls, repeats, device))
        advance()
    rows = table.rows()
    for row, key in zip(rows, [STEM, *table.entries], strict=True):
        low, middle, high = (round(float(q) / 1e6, 6) for q in np.quantile(times[key], (0.1, 0.5, 0.9)))
        row.update(latency_ms=middle, latency_p10_ms=low, latency_p90_ms=high)
    return rows


def attach(table: CostTable, file: Path, command: str) -> CostTable:
    """The table with the latencies of a file that `bossnas cost --measure --json` wrote.

    Nothing is interpolated: raises ConfigError with the first entry that the file lacks, or holds for a layer of
    another cost (another space or width), and with the ``command`` that measures it.
    """
    try:
        found = {
            (
                row["block"],
                row["layer"],
                row["candidate"],
                row["name"],
                *row["input"],
                row["macs"],
                row["params"],
            ): row.get("latency_ms")
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
        }
    except OSError as error:
        raise ConfigError("latencies", f"cannot read {file} ({error.strerror})", f"make it with {command}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError("latencies", f"{file} is not a table of latencies", f"make it with {command}") from None
    nanoseconds = []
    for row in table.rows():
        value = found.get(
            (row["block"], row["layer"], row["candidate"], row["name"], *row["input"], row["macs"], row["params"])
        )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LONGEST:
            shape = "x".join(map(str, row["input"]))
            where = (
                f"the stem on {shape}"
                if row["block"] is None
                else (
                    f"block {row['block']} layer {row['layer']} candidate {row['candidate']} ({row['name']}, "
                    f"{row['macs']} MACs) on {shape}"
                )
            )
            raise ConfigError("latencies", f"{file} has no latency for {where}", f"measure it with {command}")
        nanoseconds.append(round(value * 1e6))
    return table.with_latency(nanoseconds[0], dict(zip(table.entries, nanoseconds[1:], strict=True)))


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _candidate(layer: nn.Module, choice: int) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, choice, 1, None)


def _call(forward: Callable[[Tensor], Tensor], shape: Shape, batch: int, device: torch.device) -> Callable[[], object]:
    x = torch.randn(batch, *shape, device=device).contiguous(memory_format=torch.channels_last)
    return lambda: forward(x)


def interleaved(calls: dict[Any, Callable[[], object]], repeats: int, device: torch.device) -> dict[Any, list[int]]:
    """Nanoseconds of every call, ``repeats`` times, the calls in a new random order each time."""
    times: dict[Any, list[int]] = {key: [] for key in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    rng, keys = np.random.default_rng(0), list(calls)
    for _ in range(repeats):
        for i in rng.permutation(len(keys)):
            times[keys[i]].append(timed(calls[keys[i]], device))
    return times


def timed(call: Callable[[], object], device: torch.device) -> int:
    """Nanoseconds of one call, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns() - begin
