"""What a command prints after an error."""

from __future__ import annotations


def describe(error: Exception) -> str:
    """The message of an error; of one of the system, the file, what is wrong and what to do."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}. Check the path"
    return str(error)
