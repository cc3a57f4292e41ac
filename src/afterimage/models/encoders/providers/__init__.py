"""One library of networks a file."""
