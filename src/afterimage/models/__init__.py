"""Networks: encoders, decoders, fusions, the perceptual metric, and their weights."""
