"""Block-wise self-supervised neural architecture search for hybrid CNN-transformers (BossNAS, ICCV 2021)."""

__version__ = "0.1.0"
