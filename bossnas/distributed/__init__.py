"""Ranks that share work: collectives, launch, signs of life, the stream between blocks, and the engines."""
