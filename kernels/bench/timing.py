"""What a case is, the check of its results, and how it is timed: cold caches, CUDA graphs, neighbours compared."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # by name: tensors, lists of tensors, or None
Results = tuple[Tensor, ...]

# Bytes per second that a GPU reaches when it streams through memory, about nine tenths of what its memory could.
# Other GPUs: measured in the run with a large copy.
BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3.0e12, "NVIDIA H200": 4.3e12, "NVIDIA A100-SXM4-80GB": 1.8e12}

# Largest relative error (L2 norm over a tensor) against float64, (of results, of gradients).
# Results: fp32 keeps 24 bits and sums up to 10^6 values in blocks; bf16 and fp16 results are rounded once, to 8 and 11
# bits, and may be rounded once more before that. Gradients: a value within rounding of zero can fall on the other side
# of a ReLU, and then its whole gradient differs; with one in a million of them the norm differs by a thousandth.
TOLERANCE = {
    torch.float32: (1e-5, 3e-3),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (1e-3, 4e-3),
}
# Baselines only have to do the same work: eager code rounds between all its operations.
BASELINE_TOLERANCE = 5e-2

WARM_UP = 3
EAGER_CALLS = 10  # launches per eager measurement on a GPU
MOST_COPIES = 128  # of a case's inputs; what does not fill the cache with so many is bound by launches, not by memory


@dataclass(frozen=True)
class Side:
    """One way to do the work of a case; `run(inputs)` returns the same results on every side.

    dtype: what it needs instead of the case's dtype. graph: False where the host waits for the device, so that no
    CUDA graph can hold it.
    """

    run: Callable[[Inputs], Results]
    dtype: torch.dtype | None = None
    graph: bool = True


@dataclass(frozen=True)
class Case:
    """One thing to time.

    draw: fresh inputs, the same ones at every call. truth: the results, given the inputs in float64.
    gradients: how many of the results, counted from the last, are gradients.
    bytes_moved: what the work has to read and write at least. floor_ratio: how many times the floor `ours` may take.
    speedups: how many times slower a baseline should be, by its name.
    """

    name: str
    dtype: torch.dtype
    draw: Callable[[], Inputs]
    ours: Side
    truth: Callable[[Inputs], Results]
    baselines: dict[str, Side]
    bytes_moved: int
    gradients: int = 0
    floor_ratio: float | None = None
    speedups: dict[str, float] = field(default_factory=dict)


def generator(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`draw(*size, mean=0, dtype=..., nchw=False)`: normal numbers, maps in channels_last unless `nchw`."""
    source = torch.Generator(device).manual_seed(0)

    def draw(*size: int, mean: float = 0.0, dtype: torch.dtype = dtype, nchw: bool = False) -> Tensor:
        x = (torch.randn(size, generator=source, device=device) + mean).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 and not nchw else x

    return draw


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile for one fixed shape; earlier cases do not count against its recompile limit."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def fault(case: Case) -> str | None:
    """What is wrong with the results of `ours`; None if they agree with float64."""
    return _difference(case.ours.run(case.draw()), _truth(case), case.gradients, *TOLERANCE[case.dtype])


def measure(case: Case, device: torch.device, rounds: int, bandwidth: float | None) -> dict[str, Any]:
    """Times all sides of a case in turn. bandwidth: of the GPU in bytes per second; None on a CPU: no floor.

    Per side: median, 20 % and 80 % quantile in µs; `graphed` says whether a CUDA graph was timed, `eager_us` is
    a call from Python, launch overhead included. Per baseline `ratio`: median over neighbours of baseline ÷ ours, of
    graphs if both have one, else of eager calls. A baseline that fails has only `failed`, the reason. `copies` of the
    inputs are used in turn, on a GPU, so that none of them is in the cache any more when its turn comes.
    """
    if device.type == "cpu":
        sides, failed = _working_sides(case)
        inputs = _inputs(case, sides, copies=1)
        times = _interleaved({name: _wall(side, inputs[name], 1) for name, side in sides.items()}, rounds)
        shown = {name: {**_summary(times[name]), "graphed": False} for name in times}
        return _report(case, shown, dict.fromkeys(times, times), failed, None)

    floor_us = case.bytes_moved / bandwidth * 1e6
    # A capture forbids other streams, and autograd runs a backward pass on its forward pass's stream.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        sides, failed = _working_sides(case)
        wanted = 3 * torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(MOST_COPIES, math.ceil(wanted / case.bytes_moved))
        inputs = _inputs(case, sides, copies)
        eager = _interleaved(
            {name: _wall(side, inputs[name], max(copies, EAGER_CALLS), device) for name, side in sides.items()},
            rounds=5,
        )
        calls = copies * max(1, min(round(500 / (floor_us * copies)), 64 // copies))
        graphs = {name: _graph(side, inputs[name], calls) for name, side in sides.items()}
        graphed = _interleaved({name: _events(graph, calls) for name, graph in graphs.items() if graph}, rounds)
        del graphs, inputs
    shown, compared = {}, {}
    for name in sides:
        shown[name] = {
            **_summary(graphed.get(name, eager[name])),
            "graphed": name in graphed,
            "eager_us": statistics.median(eager[name]),
        }
        compared[name] = graphed if name in graphed and "ours" in graphed else eager
    gc.collect()
    torch.cuda.empty_cache()
    return {**_report(case, shown, compared, failed, floor_us), "copies": copies}


def verdict(result: dict[str, Any], case: Case) -> str:
    """The measurement against the case's targets: "meets", "misses by ...", or "no target"."""
    misses, known = [], False
    if case.floor_ratio is not None and "time_over_floor" in result:
        known = True
        if result["time_over_floor"] > case.floor_ratio:
            misses.append(
                f"{result['time_over_floor'] / case.floor_ratio:.2f}x: {result['time_over_floor']:.2f} times "
                f"the floor, at most {case.floor_ratio:.2f} wanted"
            )
    for name, wanted in case.speedups.items():
        ratio = result["baselines"].get(name, {}).get("ratio")
        if ratio is not None:
            known = True
            if ratio < wanted:
                misses.append(f"{wanted / ratio:.2f}x: {ratio:.2f} times as fast as {name}, {wanted:.2f} wanted")
    if misses:
        return "misses by " + "; by ".join(misses)
    return "meets" if known else "no target"


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of copying 1 GiB on the GPU, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(seconds[2:])


def first_line(error: Exception) -> str:
    """Type and message of an error, without what follows its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _truth(case: Case) -> Results:
    return case.truth(_to(case.draw(), case.dtype, torch.float64, also_fp32=True))


def _difference(got: Results, want: Results, gradients: int, of_results: float, of_gradients: float) -> str | None:
    if len(got) != len(want):
        return f"{len(got)} results instead of {len(want)}"
    for position, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if mine.shape != theirs.shape:
            return f"result {position} has shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
        error = (
            torch.linalg.vector_norm(mine.detach().double() - theirs.detach())
            / torch.linalg.vector_norm(theirs.detach()).clamp_min(1e-30)
        ).item()
        allowed = of_gradients if position >= len(want) - gradients else of_results
        if not error <= allowed:  # NaN is no agreement
            return f"result {position} differs by {error:.1e}, more than {allowed:.0e}"
    return None


def _working_sides(case: Case) -> tuple[dict[str, Side], dict[str, str]]:
    """All sides that run and do the same work, warmed up; and why the others do not."""
    want = _truth(case)
    sides, failed = {"ours": case.ours}, {}
    for name, side in case.baselines.items():
        try:
            got = side.run(_to(case.draw(), case.dtype, side.dtype or case.dtype))
            wrong = _difference(got, want, case.gradients, BASELINE_TOLERANCE, BASELINE_TOLERANCE)
        except Exception as error:  # a baseline may lack support for a dtype, a shape or this machine's compiler
            wrong = first_line(error)
        if wrong:
            failed[name] = wrong
        else:
            sides[name] = side
    return sides, failed


def _inputs(case: Case, sides: dict[str, Side], copies: int) -> dict[str, list[Inputs]]:
    """`copies` sets of inputs per side, shared by the sides of one dtype; every side has run on them."""
    by_dtype: dict[torch.dtype, list[Inputs]] = {}
    for side in sides.values():
        dtype = side.dtype or case.dtype
        if dtype not in by_dtype:
            by_dtype[dtype] = [_to(case.draw(), case.dtype, dtype) for _ in range(copies)]
    inputs = {name: by_dtype[side.dtype or case.dtype] for name, side in sides.items()}
    for name, side in sides.items():
        for turn in range(max(WARM_UP, copies)):
            side.run(inputs[name][turn % copies])
    return inputs


def _to(inputs: Inputs, old: torch.dtype, new: torch.dtype, also_fp32: bool = False) -> Inputs:
    """The inputs with tensors of dtype `old` (and fp32 ones) in dtype `new`; leaves stay leaves."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(v) for v in value]
        if isinstance(value, Tensor) and (value.dtype == old or also_fp32 and value.dtype == torch.float32):
            return value.detach().to(new).requires_grad_(value.requires_grad)
        return value

    return inputs if old == new else {name: change(value) for name, value in inputs.items()}


def _interleaved(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Microseconds per call, side after side in each round, so that what disturbs the machine disturbs all of them."""
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds if names else 0):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timers[name]())
    return times


def _wall(side: Side, inputs: list[Inputs], calls: int, device: torch.device | None = None) -> Callable[[], float]:
    """Timer of calls from Python, the device's work included."""

    def timer() -> float:
        if device is not None:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for call in range(calls):
            side.run(inputs[call % len(inputs)])
        if device is not None:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / calls * 1e6

    return timer


def _graph(side: Side, inputs: list[Inputs], calls: int) -> torch.cuda.CUDAGraph | None:
    """`calls` calls in one CUDA graph, each on the inputs that were used the longest ago; None if it cannot be."""
    if not side.graph:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept: deque[Results] = deque(maxlen=len(inputs))  # so that results, too, go to memory not in the cache
            for call in range(calls):
                kept.append(side.run(inputs[call % len(inputs)]))
    except Exception:  # whatever cannot be captured is timed in eager mode, and the report says so
        torch.cuda.synchronize()
        return None
    for _ in range(WARM_UP):
        graph.replay()
    return graph


def _events(graph: torch.cuda.CUDAGraph, calls: int) -> Callable[[], float]:
    def timer() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls * 1e3

    return timer


def _summary(times: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_us": statistics.median(times), "q20_us": fifths[0], "q80_us": fifths[3]}


def _report(case: Case, shown: dict, compared: dict, failed: dict[str, str], floor_us: float | None) -> dict[str, Any]:
    """The case as it stands in the JSON file."""
    baselines: dict[str, dict] = {name: {"failed": reason} for name, reason in failed.items()}
    for name in shown:
        if name != "ours":
            pairs = zip(compared[name][name], compared[name]["ours"], strict=True)
            baselines[name] = {**shown[name], "ratio": statistics.median(theirs / ours for theirs, ours in pairs)}
    median = shown["ours"]["median_us"]
    result = {
        "case": case.name,
        "ours": shown["ours"],
        "baselines": baselines,
        "bytes": case.bytes_moved,
        "gb_per_s": case.bytes_moved / median / 1e3,
    }
    if floor_us is not None:
        result |= {"floor_us": floor_us, "time_over_floor": median / floor_us}
        result["verdict"] = verdict(result, case)
    return result
