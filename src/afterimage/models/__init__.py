"""Networks: images to features to images."""
