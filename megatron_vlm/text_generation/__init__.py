"""The commands that generate text with any model: `serve` and `ask`."""
