"""Images to shards."""
