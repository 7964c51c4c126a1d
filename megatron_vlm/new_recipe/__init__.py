"""The command `init`: a recipe that fits the user's data and model."""
