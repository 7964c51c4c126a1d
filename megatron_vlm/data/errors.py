"""Errors in the data. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class DataError(Exception):
    """Training cannot start or continue with this data or data setting."""


class SampleError(DataError):
    """A sample that cannot be used.

    `reason` is a short category such as `missing image`, the same for all samples of its kind, so that rejected samples
    can be counted by reason.
    """

    def __init__(self, sample_id: str, file: str, reason: str, what: str, remedy: str) -> None:
        super().__init__(f"sample {sample_id!r} of {file}: {reason}: {what}. {remedy}")
        self.sample_id = sample_id
        self.file = file
        self.reason = reason
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str, str, str]]:
        """Pickles all fields: errors are passed between processes."""
        return SampleError, (self.sample_id, self.file, self.reason, self.what, self.remedy)


class ChangedOrderError(DataError):
    """A resumed run whose rows would come in another order than those of its checkpoint."""


class RowError(DataError):
    """A planned row that could not be built during training. The message names the row and the sample."""
