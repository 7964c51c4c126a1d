"""Loads a model from a folder."""
