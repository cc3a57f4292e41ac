"""What trained decoders tell about features: controls, inversion, audit. Writes numbers, draws nothing."""
