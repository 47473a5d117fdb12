"""The networks of the search spaces in timm's registry: ``timm.create_model("bossnet_t0")`` after importing this.

They take timm's usual arguments: num_classes, in_chans, drop_rate, drop_path_rate, global_pool, features_only,
checkpoint_path. There are no hosted weights: pretrained=True raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from bossnas import spaces
from bossnas.config.shared import MEAN, STD
from bossnas.networks.bossnet import T0, BossNet
from bossnas.networks.from_space import Standalone, standalone
from bossnas.networks.mbconv import MBConvNet
from bossnas.networks.nats import NatsNet
from bossnas.spaces.paths import decode, encode

BATCH_NORM_MOMENTUM = 0.1


def _cfg(size: int = 224, first_conv: str | None = "conv1", classifier: str = "fc", **changes: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "bossnet.untrained": _cfg(),
        "bossnet_t0.untrained": _cfg(),
        "bossnet_t0_nose.untrained": _cfg(),
        "bossnet_t0_288.untrained": _cfg(288),
        "bossnet_t1.untrained": _cfg(),
        "bossnet_t1_256.untrained": _cfg(256),
        "bossnas_mbconv.untrained": _cfg(first_conv="conv_stem"),
        "bossnas_nats.untrained": _cfg(
            32, "stem.0", num_classes=10, crop_pct=1.0, mean=MEAN["cifar"], std=STD["cifar"]
        ),
        "bossnas_own.untrained": _cfg(first_conv=None, classifier="head.3"),
    }
)


def _build(
    make: Callable[..., nn.Module], variant: str, pretrained: bool, args: dict[str, Any], features: int = 5
) -> nn.Module:
    """``features``: how many sizes of maps the network has."""
    given = args.get("pretrained_cfg"), args.get("pretrained_cfg_overlay")
    if pretrained and not any(cfg is not None and not isinstance(cfg, str) for cfg in given):
        raise RuntimeError(
            f"{variant} has no hosted weights: leave pretrained=True out, and give a file of weights as "
            "checkpoint_path=FILE"
        )
    return build_model_with_cfg(make, variant, pretrained, feature_cfg={"out_indices": tuple(range(features))}, **args)


@register_model
def bossnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any HyTra architecture: ``encoding``, ``width``, ``act``, ``se``, ``last_stride`` as of `BossNet`."""
    return _build(BossNet, "bossnet", pretrained, kwargs)


@register_model
def bossnet_t0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BossNet-T0: 38.4 M parameters, 3.44 G multiply-adds at 224 pixels."""
    return _build(BossNet, "bossnet_t0", pretrained, {"encoding": T0, **kwargs})


@register_model
def bossnet_t0_nose(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BossNet-T0 without squeeze-and-excitation and with ReLU: 37.3 M parameters."""
    return _build(BossNet, "bossnet_t0_nose", pretrained, {"encoding": T0, "act": "relu", "se": False, **kwargs})


@register_model
def bossnet_t0_288(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BossNet-T0 at 288 pixels: 5.73 G multiply-adds."""
    return _build(BossNet, "bossnet_t0_288", pretrained, {"encoding": T0, **kwargs})


@register_model
def bossnet_t1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BossNet-T1, which keeps the size of the maps in its last stage: 7.94 G multiply-adds."""
    return _build(BossNet, "bossnet_t1", pretrained, {"encoding": T0, "last_stride": 1, **kwargs})


@register_model
def bossnet_t1_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BossNet-T1 at 256 pixels: 10.5 G multiply-adds."""
    return _build(BossNet, "bossnet_t1_256", pretrained, {"encoding": T0, "last_stride": 1, **kwargs})


@register_model
def bossnas_mbconv(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """An architecture of the MBConv space: ``paths``, ``width``, ``last`` as of `MBConvNet`."""
    if "paths" not in kwargs:
        raise ValueError("paths: is needed, such as ['21', '1023', '3210', '0123', '1132']")
    return _build(MBConvNet, "bossnas_mbconv", pretrained, kwargs)


@register_model
def bossnas_nats(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network of NATS-Bench's size space: ``widths``, ``skip_relu`` as of `NatsNet`."""
    if "widths" not in kwargs:
        raise ValueError("widths: is needed, five channel numbers such as [64, 40, 32, 32, 24]")
    return _build(NatsNet, "bossnas_nats", pretrained, kwargs, features=3)


@register_model
def bossnas_own(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """An architecture of a space of one's own: ``space`` as path/to/file.py:ClassName, ``paths``, ``width``; it takes
    images of three channels and has no stochastic depth. Also of a built-in space: ``space`` as its name."""
    missing = {"space", "paths"} - kwargs.keys()
    if missing:
        raise ValueError(f"{min(missing)}: is needed, as in space='my_space.py:MySpace', paths=['03', '21']")
    if kwargs.pop("features_only", False):
        raise ValueError("features_only: is not made for networks of own spaces")
    return _build(_own, "bossnas_own", pretrained, kwargs)


def _own(
    space: str,
    paths: Sequence[str],
    width: float = 1.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str = "avg",
) -> Standalone:
    if drop_path_rate:
        raise ValueError(
            f"drop_path_rate: is {drop_path_rate:g}, but the layers of an own space have no stochastic "
            "depth, set it to 0"
        )
    if in_chans != 3:
        raise ValueError(f"in_chans: is {in_chans}, but a space's stem takes 3")
    any_size = 2**30  # the images' size matters to a search alone
    made = spaces.make(space, width=width, image_size=any_size, restricted=True, split="cifar10")
    architecture = [decode(path) for path in paths]
    for block in range(max(made.blocks, len(architecture))):
        allowed = made.paths(block, architecture[:block]) if block < made.blocks else []
        if block >= len(architecture) or architecture[block] not in allowed:
            raise ValueError(f"paths: {[encode(path) for path in architecture]} is no architecture of {space}")
    network = standalone(made, architecture, num_classes or 1, drop_rate, BATCH_NORM_MOMENTUM)
    network.reset_classifier(num_classes, global_pool)
    return network
