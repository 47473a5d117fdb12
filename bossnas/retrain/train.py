"""The training of a network on labelled images, written once, top to bottom (METHOD 6)."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from bossnas import __version__, log
from bossnas.config.retrain import RetrainConfig, RetrainTrain
from bossnas.data.order import FixedBatches
from bossnas.distributed import dist
from bossnas.distributed.engines import protocol
from bossnas.errors import ConfigError
from bossnas.files import write_json
from bossnas.log import logger
from bossnas.networks.spec import save_network
from bossnas.optim.base import check_bad_steps
from bossnas.retrain import evaluate
from bossnas.retrain.batches import eval_batches, eval_transform
from bossnas.retrain.run import Retraining, begin, bring_home, build, epoch_batches, prepare, restore, save, statistics
from bossnas.runs import checkpoint, session
from bossnas.runs.session import Session, warn_bad_step

SHOWN = 12  # modules that the log names
LAYERS = 3  # random stream of dropout and stochastic depth: a function of (seed, stream, epoch, micro-batch, rank)


def retrain(config: RetrainConfig, resume: str | None = None) -> Path:
    """Runs or continues the training that ``config`` describes and returns the run folder.

    Every rank calls it, after `group.init`. ``resume``: None: begin; "auto": go on with the run that the folder holds,
    or begin; else a checkpoint of that run. Raises ConfigError for what the user can mend, and Stopped when a signal
    asked the run to stop and its state is saved.

    The folder gets network.json, metrics.jsonl, checkpoints, best.safetensors (of the best evaluation), and at the end
    last.safetensors, result.json and done. Both files of weights hold those of the moving average where it was better.
    """
    main, folder = dist.rank() == 0, Path(config.out)
    log.setup(None, main)
    start = dist.from_main(lambda: begin(config, resume))
    run = dist.together(lambda: build(config, start))
    dist.together(lambda: prepare(run, folder) if main else None)
    log.setup(folder, main)
    dist.together(lambda: restore(run))
    _announce(run, folder)
    with session.opened(config, lambda line: _is_past(run, line)) as opened:
        results = _train(run, opened)
    _finish(run, folder, results)
    return folder


def _is_past(run: Retraining, line: dict) -> bool:
    """Whether the run, as it was restored, has a line of metrics behind it; an evaluation of its step is yet to come,
    or comes again."""
    return line["step"] + (line["kind"] == "eval") <= run.state.step


def _train(run: Retraining, session: Session) -> dict[str, evaluate.Result]:
    """Trains to the end and returns the last evaluation.

    A step whose gradient is not finite changes nothing and is counted; raises ConfigError after more than
    train.max_bad_steps of them.
    """
    config, train, state, engine = run.config, run.config.train, run.state, run.engine
    total, guard = run.total_steps, session.guard
    trained, _ = engine.wrap(run.network.model, run.network.average, run.optimizer.make)
    if run.where is not None:
        checkpoint.load_engine(run.where, 0, engine)
    network = torch.compile(trained) if train.compile else trained
    rates = learning_rates(train, run.steps_per_epoch)
    running = statistics(run.network.model)
    followers = [] if run.network.average is None else statistics(run.network.average)
    results: dict[str, evaluate.Result] = {}
    trained.train()

    with log.progress("train", total, state.step, dist.rank() == 0) as task, closing(_batches(run)) as batches:
        while True:
            if _evaluation_due(run):
                results = _evaluate(run, session)
                if state.step < total and guard.should_stop():
                    save(run, session.saver)
                    session.stop()
            if state.step == total:
                break
            started = time.perf_counter()
            epoch = state.step // run.steps_per_epoch
            step = _step(run, network, batches, rates(state.step), running, followers)
            seconds = time.perf_counter() - started
            state.seconds += seconds
            session.metrics.write(
                "train",
                None,
                state.step,
                epoch=epoch,
                loss=step.loss,
                lr=step.lr,
                ema=step.ema,
                images=state.images_seen,
                images_per_second=round(train.batch / seconds, 2),
                outcome=step.outcome,
                loss_scale=engine.loss_scale,
            )
            if step.outcome == "bad":
                warn_bad_step(f"step {state.step}", state.bad_steps)
            check_bad_steps(state.bad_steps, train.max_bad_steps, "", state.step)
            task.advance(
                f"epoch {epoch + 1}/{train.epochs}  loss {step.loss:.3f}  {train.batch / seconds:.0f} images/s"
            )
            guard.at(f"epoch {epoch + 1} step {state.step}")
            stop = guard.should_stop()
            if stop or state.step % config.checkpoint.every_steps == 0 or state.step == total:
                save(run, session.saver)
            if stop:
                session.stop()
    engine.close()
    logger.info(
        "%d steps in %.0f s on %d rank(s), %.1f images/s",
        total,
        state.seconds,
        dist.world_size(),
        state.images_seen / max(state.seconds, 1e-9),
    )
    return results


class _Step(NamedTuple):
    """What one optimizer step reports. ``loss``: the mean over micro-batches and ranks."""

    loss: float
    lr: float
    ema: float
    outcome: protocol.Outcome


def _step(
    run: Retraining,
    network: Callable[[Tensor], Tensor],
    batches: Iterator[tuple[Tensor, Tensor]],
    lr: float,
    running: list[Tensor],
    followers: list[Tensor],
) -> _Step:
    """One optimizer step. ``running``, ``followers``: the running statistics of the network and of its average."""
    config, train, state, engine = run.config, run.config.train, run.state, run.engine
    epoch, step = divmod(state.step, run.steps_per_epoch)
    loss_sum, before = torch.zeros((), device=run.machine.device), [s.clone() for s in running]
    for m in range(run.accumulate):
        images, targets = next(batches)
        if not train.channels_last:
            images = images.contiguous()
        # dropout and stochastic depth draw from torch's generator: their numbers, too, depend on the place alone
        torch.manual_seed(_seed(config.seed, epoch, step * run.accumulate + m, dist.rank()))
        with engine.autocast():
            loss = F.cross_entropy(network(images).float(), targets)
        seen = [s.clone() for s in running] if train.activation_checkpointing else []
        engine.micro(loss, last=m == run.accumulate - 1)
        if seen:  # the forward passes within the backward pass are not to count in the running statistics
            torch._foreach_copy_(running, seen)
        loss_sum += loss.detach()
    ema = ema_decay(train, state.step)
    outcome = engine.step(lr, ema)
    if outcome != "applied" and before:
        torch._foreach_copy_(running, before)
    elif followers:  # the engine moves the average's weights; its running statistics follow here
        torch._foreach_lerp_(followers, running, 1 - ema)
    state.step += 1
    state.images_seen += train.batch
    state.bad_steps += outcome == "bad"
    mean = torch.stack(dist.all_gather(loss_sum / run.accumulate)).mean().item()
    return _Step(mean, lr, ema, outcome)


def learning_rates(train: RetrainTrain, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate by step: linear from warmup_lr to lr, then the cosine down to min_lr at the end."""
    group = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=train.lr)  # timm's schedules set that of an optimizer
    cosine = CosineLRScheduler(
        group,
        train.epochs * steps_per_epoch,
        lr_min=train.min_lr,
        warmup_t=round(train.warmup_epochs * steps_per_epoch),
        warmup_lr_init=train.warmup_lr,
        t_in_epochs=False,
    )

    def at(step: int) -> float:
        cosine.step_update(step)
        return group.param_groups[0]["lr"]

    return at


def ema_decay(train: RetrainTrain, step: int) -> float:
    """The share of the moving average that stays at a step."""
    return min(train.ema, (1 + step) / (10 + step)) if train.ema_warmup else train.ema


def _seed(*key: int) -> int:
    seed, *place = key
    return int(np.random.default_rng([seed, LAYERS, *place]).integers(2**63))


def _batches(run: Retraining) -> Generator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches from where the run is to its end."""
    first, start = divmod(run.state.step, run.steps_per_epoch)
    for epoch in range(first, run.config.train.epochs):
        with closing(epoch_batches(run, epoch, start)) as batches:
            yield from batches
        start = 0


def _evaluation_due(run: Retraining) -> bool:
    """Whether the networks are evaluated where the run is. A run that was stopped there does it again, and finds the
    same."""
    every, (epoch, rest) = run.config.evaluate.every_epochs, divmod(run.state.step, run.steps_per_epoch)
    return run.state.step == run.total_steps or rest == 0 and epoch > 0 and every > 0 and epoch % every == 0


def _evaluate(run: Retraining, session: Session) -> dict[str, evaluate.Result]:
    """Evaluates the network and its average ("model", "ema") and keeps the weights if they are the best so far."""
    bring_home(run)
    state, config = run.state, run.config
    epoch = state.step // run.steps_per_epoch
    transform, results = eval_transform(run.network.spec), {}
    own = FixedBatches(run.val_images, config.evaluate.batch).of_rank(
        len(run.images.val), dist.rank(), dist.world_size()
    )
    for kind, home in {"model": run.network.model, "ema": run.network.average}.items():
        if home is None:
            continue
        batches = eval_batches(
            run.images.val, transform, config.data, own, classes=run.network.spec.classes, device=run.machine.device
        )
        results[kind] = evaluate.evaluate(
            home,
            batches,
            run.network.spec.classes,
            precision=config.train.precision,
            device=run.machine.device,
            advance=lambda _: session.guard.at(f"the evaluation after epoch {epoch}"),
        )
    state.evaluation_seconds += sum(result.seconds for result in results.values())
    kind, best = _better(results)
    if state.best is None or best.top1 > state.best["top1"]:
        state.best = {"top1": best.top1, "top5": best.top5, "epoch": epoch, "step": state.step, "ema": kind == "ema"}
        _write_weights(run, session.folder / "best.safetensors", kind, best)
        said = "the best so far"
    else:
        said = f"best {state.best['top1']:.2%} of epoch {state.best['epoch']}"
    session.metrics.write(
        "eval",
        None,
        state.step,
        epoch=epoch,
        best=state.best["top1"],
        **{
            ("" if kind == "model" else "ema_") + name: value
            for kind, result in results.items()
            for name, value in result.to_json().items()
            if name != "seconds"
        },
    )
    words = ", of the average ".join(f"{result.top1:.2%}" for result in results.values())
    logger.info(
        "epoch %d/%d: top-1 %s, %s",
        epoch,
        config.train.epochs,
        words,
        said,
    )
    return results


def _better(results: dict[str, evaluate.Result]) -> tuple[str, evaluate.Result]:
    return max(results.items(), key=lambda item: item[1].top1)


def _write_weights(run: Retraining, file: Path, kind: str, result: evaluate.Result) -> None:
    """By rank 0: the network's weights, or their average's (``kind``), with what was measured with them."""
    home = run.network.model if kind == "model" else run.network.average
    assert home is not None, "what was evaluated is there"
    about = {
        "run": file.absolute().parent.name,
        "step": run.state.step,
        "epoch": run.state.step // run.steps_per_epoch,
        "ema": kind == "ema",
        "bossnas": __version__,
        "val_images": result.images,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
    }

    def write() -> None:
        try:
            save_network(file, run.network.spec, home.state_dict(), about)
        except OSError as error:
            raise ConfigError(
                "out", f"cannot write {file} ({error.strerror or error})", "make room and go on with `resume` auto"
            ) from None

    dist.together(lambda: write() if dist.rank() == 0 else None)


def _finish(run: Retraining, folder: Path, results: dict[str, evaluate.Result]) -> None:
    """Writes the last weights, the result, and that the run is done."""
    kind, last = _better(results)
    _write_weights(run, folder / "last.safetensors", kind, last)
    if dist.rank() > 0:
        return
    state = run.state
    assert state.best is not None, "the run ends with an evaluation"
    result: dict[str, Any] = {
        "architecture": run.network.spec.architecture,
        "top1": last.top1,
        "top5": last.top5,
        "loss": last.to_json()["loss"],
        "ema": kind == "ema",
        "best": state.best,
        "val_images": last.images,
        "epochs": run.config.train.epochs,
        "steps": state.step,
        "images": state.images_seen,
        **run.network.price,
        "optimizer": run.optimizer.name,
        "ranks": dist.world_size(),
        "seconds": round(state.seconds, 3),
        "evaluation_seconds": round(state.evaluation_seconds, 3),
        "images_per_second": round(state.images_seen / max(state.seconds, 1e-9), 2),
    }
    write_json(folder / "result.json", result)
    logger.info(
        "top-1 %s at the end, %s at best (epoch %d)",
        f"{last.top1:.2%}",
        f"{state.best['top1']:.2%}",
        state.best["epoch"],
    )
    logger.info("everything lies in %s", folder)
    write_json(folder / "done", {"steps": state.step, "images": state.images_seen})


def _announce(run: Retraining, folder: Path) -> None:
    """The log's first lines: what is trained on what, and from where it goes on."""
    config, state, spec = run.config, run.state, run.network.spec
    session.warn_of_sample(config, len(run.images.train), len(run.images.val))
    logger.info(
        "retraining of %s: %.2f M parameters, %.2f M multiply-adds at %d pixels, %d classes, %d training and "
        "%d validation images",
        spec.architecture,
        run.network.price["params"] / 1e6,
        run.network.price["macs"] / 1e6,
        spec.image_size,
        spec.classes,
        len(run.images.train),
        run.val_images,
    )
    logger.info(
        "%s on %d %s rank(s): optimizer %s, precision %s, kernels %s%s",
        config.engine.name,
        dist.world_size(),
        run.machine.device.type,
        run.optimizer.name,
        config.train.precision,
        run.machine.kernels,
        ", compiled" if config.train.compile else "",
    )
    if run.network.inherited is not None:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in run.network.inherited.fresh))
        more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
        logger.info(
            "%d tensors are from the supernet of %s; fresh are %d, of %s%s",
            len(run.network.inherited.taken),
            config.model.run,
            len(run.network.inherited.fresh),
            ", ".join(modules[:SHOWN]) or "none",
            more,
        )
    if state.step:
        session.log_position(folder, state.step == run.total_steps, f"at step {state.step} of {run.total_steps}")
