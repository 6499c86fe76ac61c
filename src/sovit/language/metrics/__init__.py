"""Scores of captions and answers against references, without torch."""
