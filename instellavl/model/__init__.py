"""Loading a model from a folder."""
