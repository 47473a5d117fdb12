"""DeepSpeed ZeRO 0, 1 and 2, exact for a supernet in which most parameters have no gradient in a step.

ZeRO fills missing gradients with zeros; LARS leaves all-zero gradients alone, which makes that a true skip.
ZeRO 1 and 2 flatten all parameters into one vector and give each rank an equal share; our optimizers know the
parameters in it. ZeRO 3 applies stale gradients to parameters that a step did not use and is refused, as is
optimizer offload.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bossnas.distributed import dist
from bossnas.distributed.engines import protocol
from bossnas.distributed.engines.protocol import LossScale, MakeOptimizer, Outcome, Verdict
from bossnas.distributed.group import ensure_group
from bossnas.errors import ConfigError

FIELD = "engine.deepspeed"
# What DeepSpeed alone knows. Everything else is filled from our config, or means nothing here.
FREE_KEYS = {
    "zero_optimization",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "comms_logger",
    "timers",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
}
ZERO_KEYS = {
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "use_multi_rank_bucket_allreduce",
    "allgather_bucket_size",
    "overlap_comm",
    "compute_grad_norm",
}
ZERO_FIXED = {  # key: the one value that works here, why
    "ignore_unused_parameters": (True, "a step uses only the sampled paths"),
    "round_robin_gradients": (False, "the optimizer reads the parameters in their own order"),
    "parameter_alignment": (False, "the optimizer reads the parameters end to end"),
    "elastic_checkpoint": (False, "bossnas writes the optimizer state itself, for any number of ranks"),
    "offload_optimizer": (None, "it applies stale gradients to paths that a step did not sample"),
    "offload_param": (None, "it belongs to ZeRO 3, which is refused"),
}


def deepspeed_config(
    section: dict, micro_batch: int, accumulate: int, precision: str, world_size: int, optimizer: str = "lars"
) -> dict:
    """The config given to DeepSpeed: ``section`` plus what our own config says. ``optimizer``: whose it is.

    ``section`` may repeat our values (or say "auto"). Raises ConfigError, naming
    ``engine.deepspeed.<key>``, for a contradiction, an unknown key, ZeRO 3 and offload.
    """
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # our optimizers clip
        "zero_allow_untested_optimizer": True,
    }
    batch = micro_batch * accumulate * world_size
    said = dict(ours, train_batch_size=batch)
    sources = {
        "train_batch_size": "train.batch",
        "train_micro_batch_size_per_gpu": "train.micro_batch",
        "gradient_accumulation_steps": "train.batch or train.micro_batch",
        "gradient_clipping": "train.clip",
    }
    result = {}
    for key, value in section.items():
        if key in FREE_KEYS:
            result[key] = value
        elif key in said:
            if value != "auto" and value != said[key]:
                raise ConfigError(
                    f"{FIELD}.{key}",
                    f"is {value!r}, but this run needs {said[key]!r}",
                    f"remove it and set {sources[key]}" if key in sources else "remove it",
                )
        elif key in ("bf16", "fp16", "bfloat16", "torch_autocast"):
            _check_precision(key, value, precision)
        elif key == "optimizer":
            kind = value.get("type", "") if isinstance(value, dict) else value
            if str(kind).lower() != optimizer or isinstance(value, dict) and value.get("params"):
                raise ConfigError(
                    f"{FIELD}.optimizer",
                    f"the optimizer is {optimizer.upper()} with the values of the train section",
                    "remove it and set train.lr, train.momentum, train.weight_decay"
                    + (", train.trust" if optimizer == "lars" else ", train.optimizer"),
                )
        elif key == "scheduler":
            if value is not None:
                raise ConfigError(
                    f"{FIELD}.scheduler",
                    "the schedule is the method's own",
                    "remove it and set train.lr, train.epochs, train.warmup_epochs",
                )
        elif not key.startswith("_"):  # _comment
            raise ConfigError(
                f"{FIELD}.{key}",
                "unknown, or without effect here",
                f"remove it; known: {', '.join(sorted(FREE_KEYS))}",
            )
    result["zero_optimization"] = _zero_config(result.get("zero_optimization", {}))
    return result | ours


def _check_precision(key: str, value: Any, precision: str) -> None:
    enabled = value.get("enabled", False) if isinstance(value, dict) else value
    if not enabled or enabled == "auto":
        return
    same = key == "torch_autocast" and precision == "bf16" and value.get("dtype", "bfloat16") in ("bfloat16", "bf16")
    if not same:
        raise ConfigError(
            f"{FIELD}.{key}",
            f"contradicts train.precision {precision!r}, which is done by autocast "
            "(batch norm breaks with low-precision weights)",
            "remove it and set train.precision to bf16" if precision == "fp32" else "remove it",
        )


def _zero_config(zero: Any) -> dict:
    field = f"{FIELD}.zero_optimization"
    if not isinstance(zero, dict):
        raise ConfigError(field, f"is {zero!r}", 'write {"stage": 0}, 1 or 2')
    stage = zero.get("stage", 0)
    # ZeRO 3 does not clear its flat gradients: a parameter without gradient meets that of an earlier step there
    if stage == 3:
        raise ConfigError(
            f"{field}.stage",
            "ZeRO 3 applies stale gradients to paths that a step did not sample",
            "set it to 0, 1 or 2",
        )
    if stage not in (0, 1, 2) or isinstance(stage, bool):
        raise ConfigError(f"{field}.stage", f"is {stage!r}", "set it to 0, 1 or 2")
    result = {"stage": stage}
    for key, value in zero.items():
        if key in ZERO_FIXED:
            only, why = ZERO_FIXED[key]
            device = value.get("device") if isinstance(value, dict) else None
            if value != only and not (only is None and device == "none"):
                raise ConfigError(f"{field}.{key}", f"cannot be {value!r}: {why}", "remove it")
        elif key in ZERO_KEYS:
            result[key] = value
        elif not key.startswith("_"):
            raise ConfigError(
                f"{field}.{key}",
                "unknown, or without effect here",
                f"remove it; known: {', '.join(sorted(ZERO_KEYS))}",
            )
    if stage == 1 and result.get("overlap_comm"):
        raise ConfigError(
            f"{field}.overlap_comm",
            "under ZeRO 1 it loses the gradients of paths that the last micro-batch did not sample",
            "remove it or set stage to 2",
        )
    return result


class DeepSpeedEngine:
    """Data parallelism by DeepSpeed, under its launcher, torchrun, srun or none.

    ``accumulate``: micro-batches per update; ``micro_batch``: images per rank; ``precision``: fp32 | bf16
    | fp16 (autocast); ``section``: see ``deepspeed_config``, which also says what is refused.
    """

    def __init__(self, accumulate: int, micro_batch: int, precision: str, section: dict, optimizer: str = "lars"):
        self.accumulate, self.precision = accumulate, precision
        self.config = deepspeed_config(section, micro_batch, accumulate, precision, dist.world_size(), optimizer)
        self.sharded = self.config["zero_optimization"]["stage"] > 0

    def check(self, kind: str) -> None:
        protocol.check_precision(kind, self.precision)
        _check_values(_import_deepspeed(kind), self.config)

    def wrap(
        self,
        module: nn.Module,
        followers: nn.Module | None,
        make_optimizer: MakeOptimizer,
    ) -> tuple[nn.Module, nn.Module | None]:
        self._kind = next(module.parameters()).device.type
        self.check(self._kind)
        deepspeed = _import_deepspeed(self._kind)
        if self.sharded:
            fields = deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields
            if "compute_grad_norm" in fields:  # otherwise a norm that nobody reads costs a copy per parameter
                self.config["zero_optimization"].setdefault("compute_grad_norm", False)
        ensure_group()
        self._client = make_optimizer(module, followers, self.sharded)
        self._scale = LossScale(self.precision)
        index = next(module.parameters()).device.index
        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(logging.ERROR)  # it warns of every client optimizer
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                args=SimpleNamespace(**({} if index is None else {"device_rank": index})),
                model=_Shell(module),
                optimizer=self._client,
                config=self.config,
                dist_init_required=False if _has_backend() else None,
            )
        finally:
            logger.setLevel(logging.WARNING)
        if self.sharded:
            self._client.create_state()
            self._check_layout(module)
        return module, followers

    def autocast(self) -> AbstractContextManager:
        return protocol.autocast(self._kind, self.precision)

    def micro(self, loss: Tensor, last: bool) -> None:
        # the boundary is said, not counted, since a micro-batch may come in several calls; `backward` divides by the
        # accumulation itself
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(self._engine(self._scale.scaled(loss)))

    def begin_step(self, lr: float, ema: float = 1.0) -> Verdict:
        verdict = self._scale.run(self._client, self._engine.step, lr, ema)
        if self.sharded:
            self._client.follow()
        return verdict

    def step(self, lr: float, ema: float = 1.0) -> Outcome:
        return self.begin_step(lr, ema).outcome

    @property
    def loss_scale(self) -> float:
        return self._scale.value

    def gather(self) -> None:
        pass  # after a step the weights are whole on every rank

    def state(self) -> dict[str, Tensor]:
        return self._scale.add_to(self._client.full_state())

    def load(self, state: dict[str, Tensor]) -> None:
        self._client.load_full_state(self._scale.take_from(state))
        # `wrap` copied the share from the weights, which a checkpoint may have replaced since
        if self.sharded:
            self._optimizer.refresh_fp32_params()

    def close(self) -> None:
        self._engine.zero_grad()
        self._engine.destroy()
        del self._engine, self._optimizer, self._client

    def _check_layout(self, module: nn.Module) -> None:
        """Fails loudly should a version of DeepSpeed lay the parameters out differently than the optimizer assumes."""
        names = dict(module.named_parameters())
        flat = torch.cat([names[name].detach().flatten() for name in self._client.names])
        share = self._client.param_groups[0]["params"][0].detach()
        mine = flat[dist.rank() * share.numel() :][: share.numel()]
        fits = torch.equal(share[: len(mine)], mine)
        if dist.any_rank(not fits):
            raise RuntimeError(
                f"DeepSpeed {sys.modules['deepspeed'].__version__} lays out the parameters in an "
                "unknown way; use zero_optimization.stage 0 or the version that bossnas names"
            )


class _Shell(nn.Module):
    """The model that DeepSpeed sees: its forward pass is the loss, so that its hooks see each backward."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.block = module

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def _check_values(deepspeed: ModuleType, config: dict) -> None:
    """Has DeepSpeed read the config; raises ConfigError with its words when a value is of a wrong kind."""
    parser = deepspeed.runtime.config
    try:
        parser.DeepSpeedConfig(dict(config, train_batch_size=None))
    except (ValueError, TypeError, AssertionError, parser.DeepSpeedConfigError) as error:
        words = " ".join(str(error).split("For further information")[0].split())
        raise ConfigError(FIELD, f"DeepSpeed refuses it ({words})", "mend that value") from None


def _has_backend() -> bool:
    from deepspeed import comm

    return comm.is_initialized()


def _import_deepspeed(kind: str) -> ModuleType:
    """Imports DeepSpeed for device type ``kind`` (cpu | cuda), without its build of C++ code."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("engine.name", "deepspeed is not installed", "pip install deepspeed, or set it to single")
    os.environ.setdefault("DS_ACCELERATOR", kind)
    import deepspeed

    found = deepspeed.get_accelerator().device_name().partition(":")[0]
    if found != kind:
        raise ConfigError(
            "engine.device",
            f"is {kind}, but DeepSpeed runs on {found}",
            f"set the environment variable DS_ACCELERATOR={kind}",
        )
    if kind == "cpu":  # else a shared-memory all-reduce is compiled for a minute; gloo does the work
        comm: Any = sys.modules["deepspeed.comm.torch"]
        comm.build_shm_op = lambda: None
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    return deepspeed
