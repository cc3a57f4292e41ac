"""Paired comparisons and hypotheses, from scores per image."""
