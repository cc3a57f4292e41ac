"""Train decoders on the features of frozen encoders."""
