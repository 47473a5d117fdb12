"""The training of a found network with labels, and its evaluation."""
