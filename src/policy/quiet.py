"""Silence what LeRobot and torch.hub print while they build and load a policy."""

import contextlib
import io
import logging


@contextlib.contextmanager
def quiet_lerobot():
    """Drop what is printed and logged below an error within this context."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
