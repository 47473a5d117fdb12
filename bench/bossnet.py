"""BossNet: agreement with reference outputs, sizes, exports, and latencies of what is exported, in one run.

    python bench/bossnet.py --json bossnet.json                            # sizes, exports, latencies of bossnet_t0
    python bench/bossnet.py --golden golden --parts golden --json golden.json
    python bench/bossnet.py --parts latency --threads 2 --repeats 50

Weights are drawn by a fixed rule under which every layer matters (fresh ones have branches that give zero). Golden
figures: a folder with the outputs of the original release's network under the same rule. Latencies: one batch on a CPU,
the ways to run the network take turns in random order; a ratio is the median over rounds of torch eager by the other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "kernels")]

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bossnas.distributed import launch
from bossnas.files import write_json
from bossnas.networks.export import export
from bossnas.networks.fuse import fuse_bn
from bossnas.networks.spec import Network, Spec, build_network
from bossnas.selection import latency
from bossnas.spaces import cost

PARTS = ("golden", "sizes", "exports", "latency")
NETWORKS = {"bossnet_t0_nose": 224, "bossnet_t0": 224, "bossnet_t0_288": 288, "bossnet_t1": 224, "bossnet_t1_256": 256}
SIDES = (
    "torch eager",
    "torch fused",
    "torch compiled",
    "torchscript",
    "torchscript fused",
    "onnxruntime",
    "onnxruntime fused",
)
SMALL_GRADIENT = 1e-3  # norms below it are not compared: mathematically zero before a batch norm


def drawn(name: str, like: Tensor) -> Tensor:
    """The weight ``name`` by the rule of the golden outputs."""
    if not like.is_floating_point():
        return torch.zeros_like(like)
    seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
    n = np.random.RandomState(seed).standard_normal(tuple(like.shape)).astype(np.float32)
    if name.endswith("running_mean") or (like.ndim == 1 and name.endswith("bias")):
        value = 0.1 * n
    elif name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(n)
    else:
        value = n * np.sqrt(2 / np.prod(n.shape[1:])) if like.ndim > 1 else 1 + 0.1 * n
    value = value * (0.2 if name.endswith(("bn3.weight", "net.5.weight")) else 0.1 if name.endswith("fc.weight") else 1)
    return torch.from_numpy(np.asarray(value, np.float32))


def made(spec: Spec) -> nn.Module:
    model = build_network(spec)
    model.load_state_dict({name: drawn(name, tensor) for name, tensor in model.state_dict().items()})
    return model.eval()


def golden(folder: Path) -> dict:
    """Largest differences from the outputs of the original release's BossNet-T0."""
    model = made(Spec("bossnet_t0"))
    names = [name for name, *_ in json.loads((folder / "bossnet_T0_manifest.json").read_text())["state_dict"]]
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32))
    with torch.no_grad():
        evaluated = model(x).numpy()
    trained = np.load(folder / "bossnet_T0_B_train_224.npz")
    logits = model.train()(x)
    loss = F.cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = {
        name: (float(parameters[name].grad.norm()), float(norm))
        for name, norm in zip(trained["grad_names"], trained["grad_norms"], strict=True)
        if norm > SMALL_GRADIENT
    }
    wanted = np.load(folder / "bossnet_T0_B_eval_224.npz")["logits"]
    return {
        "names_in_order": names == list(model.state_dict()),
        "evaluation_logits": float(np.abs(evaluated - wanted).max()),
        "training_logits": float(np.abs(logits.detach().numpy() - trained["logits"]).max()),
        "loss": abs(float(loss.detach()) - float(trained["loss"])),
        "gradients_compared": len(norms),
        "gradient_norms_relative": max(abs(a - b) / b for a, b in norms.values()),
    }


def sizes() -> dict:
    """Parameters and multiply-adds of the released networks."""
    result = {}
    for name, size in NETWORKS.items():
        model, image = build_network(Spec(name)).eval(), torch.zeros(1, 3, size, size)
        with torch.no_grad():
            macs = cost.count([model], lambda m=model, x=image: m(x))["macs"]
        result[name] = {
            "image_size": size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": macs,
        }
    return result


def exports(spec: Spec, formats: list[str]) -> dict:
    """The formats of a network, batch norms as they are and, where that is possible, folded."""
    network, result = Network(spec, made(spec).state_dict(), {"weights": "drawn at random"}), {}
    for fuse, wanted in ((False, formats), (True, [f for f in formats if f in export.FUSABLE])):
        if wanted:
            with tempfile.TemporaryDirectory() as folder:
                rows = export.export_network(network, Path(folder) / "out", wanted, fuse=fuse)["files"]
            result.update({row["format"] + (" fused" if fuse else ""): row for row in rows})
    return result


def sides(spec: Spec, wanted: list[str], batch: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Ways to run the network once, by name."""
    model = made(spec)
    fused = fuse_bn(model)
    x = torch.randn(batch, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], object]] = {}
    for name in wanted:
        chosen = fused if name.endswith("fused") else model
        if name == "torch compiled":
            chosen = torch.compile(model, dynamic=False)
        elif name.startswith("torchscript"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen = torch.jit.freeze(torch.jit.trace(chosen, x, check_trace=False))
        elif name.startswith("onnxruntime"):
            import onnxruntime

            network = Network(spec, model.state_dict(), {})
            export.export_network(network, folder / name, ["onnx"], fuse=chosen is fused)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(
                folder / name / f"{spec.architecture}.onnx", options, providers=["CPUExecutionProvider"]
            )
            calls[name] = lambda session=session: session.run(None, {"images": x.numpy()})
            continue
        calls[name] = lambda chosen=chosen: chosen(x)
    return calls


def latencies(spec: Spec, wanted: list[str], batch: int, repeats: int) -> dict:
    """Milliseconds of a batch: medians, tenths and nine tenths; ratios to torch eager of the same round."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        calls = sides(spec, ["torch eager", *(name for name in wanted if name != "torch eager")], batch, Path(folder))
        times = {
            name: np.array(ns) / 1e6 for name, ns in latency.interleaved(calls, repeats, torch.device("cpu")).items()
        }
    eager, result = times["torch eager"], {}
    for name, ms in times.items():
        low, middle, high = np.quantile(ms, (0.1, 0.5, 0.9))
        result[name] = {
            "median_ms": float(middle),
            "p10_ms": float(low),
            "p90_ms": float(high),
            "times_as_fast": float(np.median(eager / ms)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["sizes", "exports", "latency"])
    parser.add_argument("--golden", type=Path, metavar="FOLDER", help="reference outputs, for the part golden")
    parser.add_argument("--model", default="bossnet_t0", help="of the exports and latencies")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="its further arguments")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--formats", type=export.chosen, default=list(export.FORMATS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    if "golden" in options.parts and options.golden is None:
        parser.error("the part golden needs --golden FOLDER")
    torch.set_num_threads(options.threads)
    spec = Spec(options.model, options.options, image_size=options.image_size)
    result: dict = {
        "device": latency.machine(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "torch": torch.__version__,
        "network": spec.to_json(),
    }
    run = {
        "golden": lambda: golden(options.golden),
        "sizes": sizes,
        "exports": lambda: exports(spec, (options.formats or list(export.FORMATS))),
        "latency": lambda: {
            "batch": options.batch,
            "repeats": options.repeats,
            "sides": latencies(spec, options.sides, options.batch, options.repeats),
        },
    }
    for part in options.parts:
        result[part] = run[part]()
        print(f"{part}:")
        for name, value in (result[part].get("sides") or result[part]).items():
            print(f"  {name}: {json.dumps(value)}")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    sys.exit(launch.run(main))
