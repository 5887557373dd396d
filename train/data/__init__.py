"""Data: the sources, the order of samples, and loading them."""
