"""The networks of the search spaces in timm's registry: ``timm.create_model("bossnet_t0")`` after importing this."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from bossnas.bossnet import T0, BossNet


def _cfg(size: int = 224, **changes: Any) -> dict[str, Any]:
    return {"num_classes": 1000, "input_size": (3, size, size), "pool_size": None, "crop_pct": 0.875,
            "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1", "classifier": "fc", "license": "apache-2.0", **changes}


default_cfgs = generate_default_cfgs({
    "bossnet.untrained": _cfg(),
    "bossnet_t0.untrained": _cfg(),
    "bossnet_t0_nose.untrained": _cfg(),
    "bossnet_t0_288.untrained": _cfg(288),
    "bossnet_t1.untrained": _cfg(),
    "bossnet_t1_256.untrained": _cfg(256),
})


def _bossnet(variant: str, pretrained: bool, **args: Any) -> BossNet:
    return build_model_with_cfg(BossNet, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3, 4)}, **args)


@register_model
def bossnet(pretrained: bool = False, **kwargs: Any) -> BossNet:
    """Any HyTra architecture: ``encoding``, ``width``, ``act``, ``se``, ``last_stride`` as of `BossNet`."""
    return _bossnet("bossnet", pretrained, **kwargs)


@register_model
def bossnet_t0(pretrained: bool = False, **kwargs: Any) -> BossNet:
    """BossNet-T0: 38.4 M parameters, 3.44 G multiply-adds at 224 pixels."""
    return _bossnet("bossnet_t0", pretrained, **{"encoding": T0, **kwargs})


@register_model
def bossnet_t0_nose(pretrained: bool = False, **kwargs: Any) -> BossNet:
    """BossNet-T0 without squeeze-and-excitation and with ReLU: 37.3 M parameters."""
    return _bossnet("bossnet_t0_nose", pretrained, **{"encoding": T0, "act": "relu", "se": False, **kwargs})


@register_model
def bossnet_t0_288(pretrained: bool = False, **kwargs: Any) -> BossNet:
    """BossNet-T0 at 288 pixels: 5.73 G multiply-adds."""
    return _bossnet("bossnet_t0_288", pretrained, **{"encoding": T0, **kwargs})


@register_model
def bossnet_t1(pretrained: bool = False, **kwargs: Any) -> BossNet:
    """BossNet-T1, which keeps the size of the maps in its last stage: 7.94 G multiply-adds."""
    return _bossnet("bossnet_t1", pretrained, **{"encoding": T0, "last_stride": 1, **kwargs})


@register_model
def bossnet_t1_256(pretrained: bool = False, **kwargs: Any) -> BossNet:
    """BossNet-T1 at 256 pixels: 10.5 G multiply-adds."""
    return _bossnet("bossnet_t1_256", pretrained, **{"encoding": T0, "last_stride": 1, **kwargs})
