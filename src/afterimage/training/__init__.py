"""Training of decoders on the features of frozen encoders."""
