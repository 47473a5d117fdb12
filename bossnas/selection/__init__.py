"""The best architectures of a run's ratings."""
