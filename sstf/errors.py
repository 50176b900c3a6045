"""Errors that a user can cause, each with the exit code the command line ends with.

Exit code 1: a check ran to its end, and its verdict is that something does not hold.
Exit code 2: the input is wrong and can be changed (a config key, a data row, a full disk).
Exit code 3: data that was written earlier is damaged (a truncated or altered shard or checkpoint).

A message is one sentence or two: what was found, what was expected, how to fix it.
"""


class SstfError(Exception):
    """Base of all errors that end in one clear sentence in place of a traceback."""

    exit_code = 2


class ConfigError(SstfError):
    """The run configuration is wrong: unknown key, wrong type, contradiction, out of range."""


class DataError(SstfError):
    """A conversation file, data set or chat template cannot be used."""


class TargetError(SstfError):
    """The target model cannot be loaded or lacks what a method needs."""


class HeadError(SstfError):
    """A head folder is unreadable, incomplete, or made for another target."""


class ExportError(SstfError):
    """A head cannot be written in the form that an engine loads."""


class ParityError(SstfError):
    """A head does not compute where it is served what it computed where it was trained."""

    exit_code = 1


class HubError(SstfError):
    """A model hub refuses what is asked, or cannot be reached."""


class DecodeError(SstfError):
    """A decoding request is out of range, or the model returned values that cannot be decoded."""


class WorkerError(SstfError):
    """A process that was started to share the work ended before its work did."""


class DamagedDataError(SstfError):
    """Something written earlier was truncated or altered: a shard, a manifest, a checkpoint."""

    exit_code = 3


class Stopped(Exception):
    """The user or the batch system asked for an end, and what was done is saved: exit code 0."""
