"""Architectures as networks: the spaces' own, timm's registry, files of weights."""
