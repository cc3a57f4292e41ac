"""Layers that decoders and fusions are built from."""
