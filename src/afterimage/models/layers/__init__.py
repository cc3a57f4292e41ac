"""Layers of decoders and fusions."""
