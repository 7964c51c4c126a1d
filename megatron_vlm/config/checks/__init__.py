"""Checks of settings: values and choices, parts that must fit each other and the number of processes, and paths."""
