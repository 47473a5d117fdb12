"""Old door: importing it registers the networks in timm, as `bossnas.networks.registry` does."""

from bossnas.networks import registry

__all__ = ["registry"]
