"""A network for use elsewhere."""
