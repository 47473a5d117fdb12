"""`bossnas export`: a trained network in the formats that other programs read, each compared with the network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bossnas.errors import ConfigError
from bossnas.files import open_to_others, write_json, write_text
from bossnas.layout import Column, both, brief, table
from bossnas.log import logger, progress
from bossnas.networks import pretrained
from bossnas.networks.export.card import card, readme
from bossnas.networks.export.python_file import BLOCKED, check_alone, source_text
from bossnas.networks.fuse import fuse_bn
from bossnas.networks.spec import Network, build_network, load_network, refused_images, save_network

FORMATS = ("safetensors", "onnx", "torchscript", "torch_export", "standalone", "hub")
FUSABLE = ("onnx", "torchscript", "torch_export")  # the others hold weights under the network's own names
# Largest difference of logits, of the largest logit where that is above 1. Files that hold the weights as they are are
# computed by the same code; the rest may sum in another order.
LIMITS = {"safetensors": 1e-6, "standalone": 1e-5, "hub": 1e-5, "onnx": 1e-4, "torchscript": 1e-4, "torch_export": 1e-4}
# Two sizes show a batch dimension that a converter made constant. The larger one is traced: torch.export makes a
# dimension of size 1 constant.
BATCHES = (1, 3)  # images of the two comparisons
OPSET = 18  # the oldest that torch writes without converting
ONE_FILE = 2**31 - 2**20  # bytes that an ONNX file holds; larger weights lie beside it
LONGEST = 900  # seconds that another process may take to load a network


def chosen(text: str) -> list[str] | None:
    """ "onnx,hub" -> names of formats; "all" -> None: all that the network has. ConfigError for an unknown one."""
    if text.strip() == "all":
        _check_formats(FORMATS)
        return None
    formats = [part.strip() for part in text.split(",") if part.strip()]
    _check_formats(formats)
    return list(dict.fromkeys(formats))


def export(
    source: Path,
    out: Path,
    formats: Sequence[str] | None,
    *,
    fuse: bool = False,
    batch: int | None = None,
    force: bool = False,
    **opening: Any,
) -> dict[str, Any]:
    """Opens a network (``opening``: what `pretrained.open_network` is to know) and exports it: see `export_network`."""
    _check_formats(FORMATS if formats is None else formats)
    _check_out(out, force)
    network = pretrained.open_network(source, **opening)
    return export_network(network, out, formats, fuse=fuse, batch=batch, force=force)


def export_network(
    network: Network,
    out: Path,
    formats: Sequence[str] | None,
    *,
    fuse: bool = False,
    batch: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes a network into the folder ``out``, with card.json and README.md; returns what card.json holds.

    ``formats``: None: all, but standalone where the network needs more than torch. Every file is read back and its
    logits are compared with the network's, on random images in batches of 1 and 3; all is done in a folder beside
    ``out``, which appears when everything agrees. ``fuse``: batch norms are folded in `FUSABLE` formats. ``batch``: the
    only number of images that those formats take; None: any. ``force``: files in ``out`` may be replaced; those of
    other names stay.
    Raises ConfigError for an unknown format, a missing package, a format that the network does not have, logits that
    differ by more than `LIMITS`, and a folder that cannot be written.
    """
    everything, formats = formats is None, FORMATS if formats is None else formats
    _check_formats(formats)
    _check_out(out, force)
    if fuse and not set(formats) & set(FUSABLE):
        raise ConfigError(
            "fuse_bn",
            f"changes nothing in {', '.join(formats)}, which keep the network's own weights",
            f"leave it out, or add one of {', '.join(FUSABLE)}",
        )
    with torch.random.fork_rng(devices=[]):
        model = build_network(network.spec)
    pretrained.fit(model, network.weights, "the file")
    model.eval().requires_grad_(False)
    if "standalone" in formats:
        try:
            check_alone(model)
        except ConfigError as error:
            if not everything:
                raise
            logger.info("no standalone file: %s", error.problem)
            formats = [name for name in formats if name != "standalone"]
    subject = _subject(network, model, fuse, batch)
    draft = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        rows = []
        with progress("exports", len(formats)) as task:
            for name in formats:
                rows.append(_write(name, subject, draft))
                task.advance(name)
        result = card(subject.name, network, model, rows)
        write_json(draft / "card.json", result)
        write_text(draft / "README.md", readme(result, subject.ours))
        if "hub" in formats:
            alone = {**result, "files": [row for row in rows if row["format"] == "hub"]}
            write_text(draft / "hub" / "README.md", readme(alone, subject.ours))
        _publish(draft, out)
    except OSError as error:
        raise ConfigError("out", f"cannot write {out} ({error.strerror or error})", "choose another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return result


def lines(result: dict[str, Any], space: int) -> list[str]:
    """The result of `export` as text of at most ``space`` columns."""
    files = result["files"]
    title = (
        f"{result['name']}: {both(result['parameters'])} parameters, {both(result['multiply_adds'])} multiply-adds at "
        f"{result['network']['image_size']} pixels"
    )
    columns = [
        Column("format", [row["format"] for row in files], text=True),
        Column("size", [brief(row["bytes"], "B") for row in files]),
        Column("largest\ndifference", [f"{row['difference']:.1e}" for row in files]),
        Column("limit", [f"{row['limit']:.1e}" for row in files]),
        Column("batch\nnorms", ["folded" if row["fused"] else "kept" for row in files], text=True),
        Column("files", [", ".join(row["files"]) for row in files], text=True),
    ]
    return table(title, columns, space)


@dataclass(frozen=True)
class _Subject:
    """What is exported. ``fused``: the network with folded batch norms, or the network itself. ``images``,
    ``logits``: the two batches of the comparison. ``ours``: bossnas holds the network's definition."""

    name: str
    network: Network
    model: nn.Module
    fused: nn.Module
    images: list[Tensor]
    logits: list[Tensor]
    batch: int | None
    ours: bool

    def shapes(self) -> tuple[dict[int, Any]] | None:
        """Which dimensions of the images may be of any size, for torch.export."""
        return None if self.batch else ({0: torch.export.Dim("batch", min=1)},)

    def run(self, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [call(images) for images in self.images]


def _subject(network: Network, model: nn.Module, fuse: bool, batch: int | None) -> _Subject:
    spec, generator = network.spec, torch.Generator().manual_seed(0)
    shape = (spec.model_args.get("in_chans", 3), spec.image_size, spec.image_size)
    images = [torch.randn(count, *shape, generator=generator) for count in ((batch, batch) if batch else BATCHES)]
    try:
        with torch.no_grad():
            logits = [model(one) for one in images]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise refused_images(spec, error) from None
    if not all(bool(torch.isfinite(one).all()) for one in logits):
        raise ConfigError("checkpoint", "the network's logits are not finite", "train it again, or take another one")
    fused = fuse_bn(model, images[-1]) if fuse else model
    ours = type(model).__module__.startswith("bossnas.")
    return _Subject(re.sub(r"\W", "_", spec.architecture), network, model, fused, images, logits, batch, ours)


def _write(name: str, subject: _Subject, folder: Path) -> dict[str, Any]:
    """Writes one format into the folder and compares what it gives; the row about it."""
    writers = {
        "safetensors": _safetensors,
        "onnx": _onnx,
        "torchscript": _torchscript,
        "torch_export": _torch_export,
        "standalone": _standalone,
        "hub": _hub,
    }
    before = set(folder.rglob("*"))
    try:
        given = writers[name](subject, folder)
    except Exception as error:  # converters raise what the network's code makes of symbolic sizes, in their own ways
        if isinstance(error, (OSError, ConfigError)) or name not in FUSABLE:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            name,
            f"cannot be made of {subject.network.spec.architecture} ({type(error).__name__}: {reason})",
            "leave it out of `formats`",
        ) from error
    files = sorted(file for file in set(folder.rglob("*")) - before if file.is_file())
    scale = max(1.0, max(float(logits.abs().max()) for logits in subject.logits))
    difference = max(float((a - b).abs().max()) for a, b in zip(given, subject.logits, strict=True))
    limit = LIMITS[name] * scale
    if not difference <= limit:
        raise ConfigError(
            name,
            f"gives other logits than the network: the largest difference is {difference:.2e}, allowed is {limit:.2e}",
            "leave it out of `formats`",
        )
    return {
        "format": name,
        "files": [str(file.relative_to(folder)) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "difference": difference,
        "limit": limit,
        "fused": subject.fused is not subject.model and name in FUSABLE,
    }


def _safetensors(subject: _Subject, folder: Path) -> list[Tensor]:
    file = folder / f"{subject.name}.safetensors"
    save_network(file, subject.network.spec, subject.model.state_dict(), subject.network.about)
    read = load_network(file)
    model = build_network(read.spec)
    model.load_state_dict(read.weights)
    return subject.run(model.eval())


def _onnx(subject: _Subject, folder: Path) -> list[Tensor]:
    import onnx
    import onnxruntime

    file = folder / f"{subject.name}.onnx"
    large = sum(t.numel() * t.element_size() for t in subject.fused.state_dict().values()) > ONE_FILE
    torch.onnx.export(
        subject.fused,
        (subject.images[-1],),
        file,
        dynamo=True,
        dynamic_shapes=subject.shapes(),
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        external_data=large,
        verbose=False,
    )
    onnx.checker.check_model(file)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, session_options, providers=["CPUExecutionProvider"])
    return subject.run(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))


def _torchscript(subject: _Subject, folder: Path) -> list[Tensor]:
    file = folder / f"{subject.name}.torchscript.pt"
    with warnings.catch_warnings():  # that TorchScript is deprecated, and that shapes become constants
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(subject.fused, subject.images[-1], check_trace=False)
        torch.jit.save(traced, str(file), _extra_files={"network.json": _description(subject)})
        return subject.run(torch.jit.load(str(file)))


def _torch_export(subject: _Subject, folder: Path) -> list[Tensor]:
    file = folder / f"{subject.name}.pt2"
    program = torch.export.export(subject.fused, (subject.images[-1],), dynamic_shapes=subject.shapes())
    torch.export.save(program, file, extra_files={"network.json": _description(subject)})
    return subject.run(torch.export.load(file).module())


def _standalone(subject: _Subject, folder: Path) -> list[Tensor]:
    file = folder / f"{subject.name}.py"
    torch.save(subject.model.state_dict(), file.with_suffix(".pt"))
    write_text(file, source_text(subject.model, subject.name, subject.network.spec))
    blocked = f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
    code = (
        f"{blocked}import runpy\nrunpy.run_path({str(file)!r}, run_name='__main__')\n"
        f"call = runpy.run_path({str(file)!r})['load']()\n"
    )
    return _elsewhere("standalone", code, subject, folder, ["-I"])


def _hub(subject: _Subject, folder: Path) -> list[Tensor]:
    spec, hub = subject.network.spec, folder / "hub"
    about = {
        "tag": "exported",
        "license": None,
        "input_size": tuple(subject.images[0].shape[1:]),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop,
    }
    timm.models.save_for_hf(
        subject.model,
        str(hub),
        safe_serialization=True,
        model_config={"pretrained_cfg": about, "model_args": dict(spec.model_args)},
    )
    open_to_others(hub / "model.safetensors")
    registered = "import bossnas.timm_models\n" if subject.ours else ""
    code = (
        f"import sys\nsys.path[:] = {sys.path!r}\n{registered}import timm\n"
        f"call = timm.create_model({f'local-dir:{hub}'!r}, pretrained=True).eval()\n"
    )
    return _elsewhere("hub", code, subject, folder, [])


def _elsewhere(name: str, code: str, subject: _Subject, folder: Path, flags: list[str]) -> list[Tensor]:
    """The logits that another Python process gets from ``call``, which ``code`` makes there."""
    given, found = folder / f".{name}.images", folder / f".{name}.logits"
    torch.save(subject.images, given)
    code += (
        f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
        f"with torch.no_grad():\n    logits = [call(images) for images in torch.load({str(given)!r})]\n"
        f"torch.save(logits, {str(found)!r})\n"
    )
    try:
        done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=LONGEST)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ConfigError(name, f"cannot be loaded in another process ({reason})", "leave it out of `formats`")
        return torch.load(found)
    except subprocess.TimeoutExpired:
        raise ConfigError(name, f"was not loaded within {LONGEST} s", "try again on a less busy machine") from None
    finally:
        given.unlink(missing_ok=True)
        found.unlink(missing_ok=True)


def _description(subject: _Subject) -> str:
    return json.dumps(subject.network.spec.to_json())


def _publish(draft: Path, out: Path) -> None:
    """Moves what is in the draft to ``out``, at once where nothing is there yet."""
    if not out.exists():
        os.replace(draft, out)
        return
    for new in sorted(draft.iterdir()):
        old = out / new.name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(new, old)


def _check_formats(formats: Sequence[str]) -> None:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(
            "formats",
            f"there is no {unknown[0]!r}" if unknown else "is empty",
            f"choose of {', '.join(FORMATS)}, or all",
        )
    missing = [p for p in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(p) is None]
    if "onnx" in formats and missing:
        raise ConfigError("onnx", f"{' and '.join(missing)} not installed", "pip install onnx onnxruntime onnxscript")


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError("out", f"{out} is a file", "name a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError("out", f"{out} is not empty", "choose another folder, or write into it with `force`")
