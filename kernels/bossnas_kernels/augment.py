"""K4: being written."""
