"""The one base class of errors that a user can mend: the command line prints them as one line, without a trace."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong or missing. The message is one line that names it and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))


class MissingFileError(UserError):
    """A file that is not there, for whoever can do without it."""


class BusyError(UserError):
    """Another process works there now; later there is nothing to mend."""
