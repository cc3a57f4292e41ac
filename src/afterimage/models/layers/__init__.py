"""Layers that decoders are made of."""
