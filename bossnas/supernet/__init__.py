"""The method on tensors: the supernet, its losses, the training of a block and its rating."""
