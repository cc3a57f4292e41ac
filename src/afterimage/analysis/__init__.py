"""Analyses of trained decoders: controls, inversion and audit. They write numbers and draw nothing."""
