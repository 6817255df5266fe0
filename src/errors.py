"""UserError, and the one translator of library errors into it."""

import contextlib
import difflib


class UserError(ValueError):
    """A mistake the user can mend: the message says what, expected against got, and the remedy, in one line."""


def nearest(name: str, names) -> str:
    """`, did you mean x?` for the known name that `name` was probably meant to be, else an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException) -> str:
    """The message of another library's error, with its line breaks folded away."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def hub_errors(what: str):
    """Errors of a download or upload as `what` and the reason, in one line."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{what}: no such folder, and not on the Hub (or private: run hf auth login)") from error
    except (httpx.TransportError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise UserError(
            f"{what}: no such folder, and the Hub cannot be reached ({one_line(error)[:120]}): "
            "pass a folder, or try again online"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        raise UserError(f"{what}: the Hub refuses it ({one_line(error)[:200]})") from error


@contextlib.contextmanager
def dataset_errors(dataset_id: str):
    """What can keep LeRobot from opening a dataset, in one line."""
    from lerobot.datasets.utils import CompatibilityError

    try:
        with hub_errors(f"no dataset {dataset_id}"):
            yield
    except UserError:
        raise
    except (CompatibilityError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"dataset {dataset_id} cannot be opened: {one_line(error)[:300]}") from error


@contextlib.contextmanager
def policy_errors(name: str):
    """The ways in which a policy refuses its settings, as one line each."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"policy {name} needs more than is installed: {one_line(error)}") from error
    except OSError as error:  # urllib's URLError when a backbone's weights are fetched offline
        raise UserError(
            f"policy {name}: pretrained weights cannot be fetched ({one_line(error)}): "
            "go online once, or pass --policy_args pretrained_backbone_weights=none"
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(f"policy {name}: {one_line(error)}") from error
