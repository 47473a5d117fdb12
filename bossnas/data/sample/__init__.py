"""The images that are used when no data are named: see README.md in this folder."""
