"""Compressed folders: checked, read into a model, and written a tensor at a time."""
