"""Libraries of pretrained encoders, one in each file."""
