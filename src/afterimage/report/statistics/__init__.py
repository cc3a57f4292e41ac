"""Paired comparisons and tests of hypotheses, from scores per image."""
