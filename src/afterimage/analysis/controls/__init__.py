"""Controls: is the image preserved in the features, or guessed by the decoder?"""
