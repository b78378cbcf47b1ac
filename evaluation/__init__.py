"""Scores of generated images: readers, feature networks, statistics and the report."""
