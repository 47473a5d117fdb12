"""A search on paper: memory, communication and hours."""
