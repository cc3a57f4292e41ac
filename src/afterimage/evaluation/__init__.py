"""Score reconstructions against their originals."""
