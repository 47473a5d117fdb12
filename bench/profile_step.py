"""Where a training step's CPU time goes: kinds of operations, and the multiply-adds that the step must do.

    python bench/profile_step.py                                  # all rows of bench/step.py --against-official
    python bench/profile_step.py --only mbconv:0 --threads 2 --operations 12

A step on 8 random images in fp32, without data loading, the third one of its process. A kind's milliseconds are those
of its operations without what they call, as torch's profiler counts them; with two threads they are wall time.
"""

import argparse
import collections
import subprocess
import sys
import time

import torch
from step import ROWS, ours, prepared
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

KINDS = ("convolution", "depthwise", "product", "norm", "activation", "copy", "pointwise", "optimizer", "other")
CONVOLUTIONS = ("mkldnn_convolution", "convolution_backward", "_slow_conv2d_forward", "thnn_conv2d", "_conv_depthwise")
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mkldnn_linear",
    "_linear_pointwise",
    "_scaled_dot_product_flash_attention_for_cpu",
)
COPIES = ("copy_", "cat", "clone", "fill_", "zero_", "index_select", "constant_pad_nd", "im2col", "col2im")
POINTWISE = (
    "mul",
    "add",
    "sub",
    "div",
    "mul_",
    "add_",
    "sub_",
    "div_",
    "addcmul",
    "sum",
    "mean",
    "neg",
    "rsqrt",
    "sqrt",
)
ACTIVATIONS = ("silu", "relu", "threshold", "sigmoid", "softmax", "clamp_min", "hardtanh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--operations", type=int, default=0, metavar="N", help="also the N dearest operations, by shape"
    )
    options = parser.parse_args()
    if len(options.only) == 1:
        print(line_of(options.only[0], options.threads, options.operations))
        return
    print("| block | step, ms | GFLOP | " + " | ".join(KINDS) + " |")
    print("|---" * (3 + len(KINDS)) + "|")
    for row in options.only:  # a process each: memory that a block has used would serve the next one
        command = [sys.executable, __file__, "--only", row, "--threads", str(options.threads)]
        print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip(), flush=True)


def line_of(row: str, threads: int, operations: int) -> str:
    torch.set_num_threads(threads)
    run, views = prepared(row)
    steps = ours(run, views)
    next(steps)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward}) as counter:
        next(steps)
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        next(steps)
    took = time.perf_counter() - started
    times: collections.Counter = collections.Counter()
    dear: collections.Counter = collections.Counter()
    for event in found.events():
        if event.self_cpu_time_total:
            times[kind(event.name, event.input_shapes)] += event.self_cpu_time_total
            dear[event.name, str([s for s in event.input_shapes or [] if s])[:90]] += event.self_cpu_time_total
    for (name, shapes), micros in dear.most_common(operations):
        print(f"{micros / 1e3:9.1f} ms  {name:<40} {shapes}")
    cells = [f"{took * 1e3:.0f}", f"{counter.get_total_flops() / 1e9:.1f}", *(f"{times[k] / 1e3:.0f}" for k in KINDS)]
    return f"| {row} | " + " | ".join(cells) + " |"


def backward(gradient: list, x: list, weight: list, *rest: object, out_shape: object = None, **_: object) -> int:
    """Of a convolution's gradients; PyTorch counts the weight gradient of a depthwise one as a dense one's."""
    transposed, wanted = rest[4], rest[7]
    return (wanted[0] + wanted[1]) * conv_flop_count(x, weight, gradient, transposed)


def kind(name: str, shapes: list) -> str:
    short = name.partition("::")[2] or name
    if short.startswith(CONVOLUTIONS):
        weight = shapes[2 if "backward" in short else 1] if shapes and len(shapes) > 2 else []
        return "depthwise" if len(weight) == 4 and weight[1] == 1 and weight[0] > 1 else "convolution"
    if short.startswith(PRODUCTS):
        return "product"
    if "batch_norm" in short or "GroupByGroup" in name:
        return "norm"
    if short.startswith("_foreach"):
        return "optimizer"
    if short.startswith(ACTIVATIONS) or short.startswith(("_softmax",)):
        return "activation"
    if short in COPIES:
        return "copy"
    return "pointwise" if short in POINTWISE else "other"


if __name__ == "__main__":
    main()
