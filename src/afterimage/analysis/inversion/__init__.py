"""Feature inversion: find the image by optimisation, from grey or from a decoder's reconstruction."""
