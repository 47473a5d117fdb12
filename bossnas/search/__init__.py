"""A search: train the blocks, rate them, keep the winners."""
