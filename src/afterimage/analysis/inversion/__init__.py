"""Feature inversion: find the image by optimisation, from scratch or from a decoder's answer."""
