"""Scores of reconstructions against their originals."""
