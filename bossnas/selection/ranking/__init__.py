"""Ratings held against true accuracies."""
