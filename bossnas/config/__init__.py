"""Every key of a config, with its unit and default."""

from bossnas.config.loading import load
from bossnas.config.retrain import RetrainConfig
from bossnas.config.search import Config

__all__ = ["Config", "RetrainConfig", "load"]
