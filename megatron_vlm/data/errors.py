"""What can be wrong with data, told so that a person can mend it."""

from __future__ import annotations


class DataError(Exception):
    """Data or a data setting that training cannot go on with."""


class SampleError(DataError):
    """One sample that cannot be used.

    `reason` is a short class of mistake, the same for all samples that make it, so that refusals can be counted by it.
    """

    def __init__(self, sample_id: str, file: str, reason: str, what: str, remedy: str) -> None:
        super().__init__(f"sample {sample_id!r} of {file}: {reason}: {what}. {remedy}")
        self.sample_id = sample_id
        self.file = file
        self.reason = reason
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str, str, str]]:
        """Travels between processes whole."""
        return SampleError, (self.sample_id, self.file, self.reason, self.what, self.remedy)


class RowError(DataError):
    """A planned row that could not be built while training; the message names the row and the sample."""
