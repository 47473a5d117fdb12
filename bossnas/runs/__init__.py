"""What a run leaves, and how it goes on: folder, metrics, ratings, checkpoints."""
