"""Printing that never ends a run, even to a closed pipe, a full disk, or a terminal that is gone or lacks a character."""

import contextlib
import errno
import os
import sys

# Nobody reads any more: the reader of a pipe has ended (`| head`), the terminal was closed, or the stream never was open.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class SafeStream:
    """A text stream whose writes never fail: what cannot be written is left out.

    Args:
        stream: sys.stdout or sys.stderr; None if it was closed before the program began.
        errors: where the first failure is reported, unless nobody reads any more; None for nowhere.

    Attributes:
        failure: the last error of a stream that somebody reads; None so far.
    """

    def __init__(self, stream, errors=None):
        self.owns_stream = stream is None
        if self.owns_stream:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (`close_own` closes it)
        self.stream = stream
        self.errors = errors
        self.failure: OSError | None = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: somebody has closed it
            self._keep(error)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._keep(error)

    def isatty(self) -> bool:
        return not getattr(self.stream, "closed", False) and self.stream.isatty()

    def _keep(self, error: OSError | ValueError) -> None:
        if not isinstance(error, OSError) or error.errno in GONE:
            return
        is_first = self.failure is None
        self.failure = error
        if is_first and self.errors is not None:
            reason = error.strerror or str(error)
            self.errors.write(f"warning: standard output cannot be written ({reason}): what is printed there is lost\n")
            self.errors.flush()

    def close_own(self) -> None:
        if self.owns_stream:
            self.stream.close()


@contextlib.contextmanager
def safe_output():
    """Within this, sys.stdout and sys.stderr are SafeStreams. Yields that of sys.stdout."""
    fill_closed_numbers()
    errors = SafeStream(sys.stderr)
    output = SafeStream(sys.stdout, errors)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            yield output
        finally:
            output.flush()
            errors.flush()
            output.close_own()
            errors.close_own()


def fill_closed_numbers() -> None:
    """Open the null device as each of the descriptors 0 to 2 that is closed.

    Otherwise the next file to be opened, such as a checkpoint, gets that number, and receives what libraries print to it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:  # `open` takes the lowest free number
                os.set_inheritable(number, True)  # as the standard ones are


@contextlib.contextmanager
def command_output():
    """`safe_output` in a command, whose process ends soon: what cannot be written then is dropped.

    Otherwise Python tries again as it exits, and fails with status 120.
    """
    try:
        with safe_output() as output:
            yield output
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):  # it has no descriptor
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
