"""From shards to batches of views."""
