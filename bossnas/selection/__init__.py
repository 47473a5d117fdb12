"""The best architectures of a run's ratings."""

# How scores of blocks are put together (`combine`). Here, because the command line shows it without importing numpy.
HOW = {
    "sum": "the scores as they are, as in the paper",
    "standardised": "every block counts alike: its scores minus their mean, by their standard deviation",
    "layers": "every layer counts alike: as standardised, times the root of the block's number of layers",
    "ranks": "every block counts alike: the ranks of its paths, from 0 to 1",
}
