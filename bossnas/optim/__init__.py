"""Optimizers behind the engines: LARS with the following target network, and those of libraries."""
