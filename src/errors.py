"""UserError, and the one translator of library errors into it."""

import contextlib
import difflib
import errno
import importlib.metadata
import json
import os
import re
import shlex
import sys
import unicodedata
import urllib.error
from pathlib import Path
from textwrap import shorten

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # the errors of a disk that come without a file name
WRAPPERS = (OSError, ValueError, RuntimeError)  # in which libraries wrap what went wrong; others are bugs
READ_SUFFIXES = (".json", ".safetensors", ".pth", ".bin", ".model")  # files that are read in a policy's folder

# Remedies for wrong statistics of a dataset: in any format, and in v3.0, which is all that LeRobot's tool reads.
DELETE_STATISTICS = (
    "Delete meta/stats.json (or meta/episodes_stats.jsonl, where there is one): "
    "what is missing is computed from the data"
)
RECOMPUTE_STATISTICS = (
    "Recompute them: lerobot-edit-dataset --repo_id local/copy --root FOLDER --new_root COPY "
    "--operation.type recompute_stats"
)


def printable(text: str) -> str:
    """A text for one line of a terminal: line breaks, escapes and other characters that show nothing are written as `\\n`."""
    shown = []
    for character in text:
        if not character.isprintable() and unicodedata.category(character) != "Zs":  # spaces of all kinds stay
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: what is wrong, expected against got, what to do.

    Args:
        message: the line. Names in it may hold anything: it is made `printable`.
        more: further lines, of a list of problems.
    """

    def __init__(self, message: str, *more: str):
        super().__init__("\n".join(map(printable, (message, *more))))


def nearest(name: str, names) -> str:
    """`, did you mean 'x'?` with the known name closest to `name`; an empty string if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def first_of(names: list[str], most: int = 10) -> str:
    """A list of names for a message; of many, the first and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"


def plural(count: int, noun: str) -> str:
    """A number of things: `1 row`, `2 rows`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def likeliest_pairs(wanted: dict, candidates: dict) -> dict[str, str]:
    """Which of the candidates each wanted name probably means: of the same kind, and nearest in name; each once.

    Args:
        wanted, candidates: {name: kind}, where kinds are compared, such as "camera" or a shape.

    Returns:
        {candidate: wanted name}, without those that have none of their kind left.
    """
    scored = []
    for name, kind in wanted.items():
        for candidate, other_kind in candidates.items():
            if kind == other_kind:
                alike = difflib.SequenceMatcher(None, last_part(name), last_part(candidate)).ratio()
                scored.append((alike, name, candidate))
    pairs = {}
    for _, name, candidate in sorted(scored, key=lambda entry: -entry[0]):
        if candidate not in pairs and name not in pairs.values():
            pairs[candidate] = name
    return pairs


def last_part(name: str) -> str:
    """An observation's name without what most begin with: observation.images.top is top."""
    return name.removeprefix("observation.").removeprefix("images.")


def rename_flag(pairs: dict[str, str], given: dict[str, str] | None = None) -> str:
    """The ready-made --rename for {old: new} pairs, with those given already, since the last flag counts.

    An old name that a given pair makes stands for that pair's own old name.
    """
    given = given or {}
    names_before = {new: old for old, new in given.items()}
    merged = given | {names_before.get(old, old): new for old, new in pairs.items()}
    return "--rename " + " ".join(shlex.quote(f"{old}={new}") for old, new in merged.items())


def rename_remedy(pairs: dict[str, str], given: dict[str, str]) -> str:
    """`Pass --rename ...` as by `rename_flag`, without pairs by which a name would stay: those given undo themselves."""
    names_before = {new: old for old, new in given.items()}
    kept = {old: new for old, new in pairs.items() if names_before.get(old) != new}
    undone = {names_before[old] for old in pairs.keys() - kept.keys()}
    still_given = {old: new for old, new in given.items() if old not in undone}
    if not kept and not still_given:
        return "Leave --rename out"
    return f"Pass {rename_flag(kept, still_given)}"


def one_line(error: BaseException) -> str:
    """The message of another library's error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def reason_of_disk(error: OSError) -> str:
    """Why the system refused something with a file. Not every OSError has a `strerror`."""
    return error.strerror or one_line(error)


def find_path(text: str | Path, what: str) -> Path | None:
    """The path that a flag names, with ~ expanded; None if nothing is there.

    The one place that asks whether a path of the user's exists, so that one that cannot exist is a line too.

    Args:
        what: the flag or noun that messages call it by.

    Raises:
        UserError: it has a NUL or is too long, the system's encoding lacks a character of it, or it may not be entered.
    """
    text = str(text)
    remedy = "Pass another path"
    try:
        path = Path(os.path.expanduser(text))
        str(path).encode()  # fails for a name that is not in UTF-8, which could not be printed
        os.fsencode(path)
        if path.is_dir():
            os.stat(os.path.join(path, "."))  # which asks for the permission to enter it
        else:
            path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = reason_of_disk(error)
    except UnicodeError:
        encoding = sys.getfilesystemencoding()
        reason = "its name is not in UTF-8"
        if encoding != "utf-8":
            reason = f"the encoding of file names here is {encoding}, which lacks a character of it"
            remedy = "Set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8"
    except ValueError as error:
        reason = one_line(error)
    else:
        return path
    shown = text
    if len(shown) > 100:
        shown = f"{shown[:60]}...{shown[-20:]}"
    raise UserError(f"{what} {shown} cannot be opened: {reason}. {remedy}")


def not_a_file(path: Path) -> str | None:
    """What is at the path of a file that is to be read, such as "a folder"; None for a file, and where there is nothing.

    Reading a pipe waits for ever, and a link to nothing looks like a file that is absent.
    """
    if os.path.isfile(path) or not os.path.lexists(path):
        return None
    if os.path.isdir(path):
        return "a folder"
    if os.path.exists(path):
        return "a pipe, a socket or a device"
    return "a link to nothing"


def require_file(path: Path, remedy: str = "") -> None:
    """Raise a UserError if something other than a file is at a path that is to be read. There may be nothing."""
    end = f". {remedy}" if remedy else ""
    found = not_a_file(path)
    if found:
        raise UserError(f"{path} cannot be read: expected a file, got {found}{end}")


def require_files(folder: Path, remedy: str) -> None:
    """Raise a UserError if a folder has something other than a file under a name that is read: JSON, tensors or a pickle."""
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_SUFFIXES:
            require_file(path, remedy)


def read_json(path: Path, remedy: str = "") -> dict:
    """The object that a JSON file holds.

    Args:
        remedy: what to do where it holds none, to end the message.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    require_file(path, remedy)
    end = f". {remedy}" if remedy else ""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():  # encode() fails for half a character, which could not be written again
            json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:  # the last of deeply nested lists
        raise UserError(f"{path} cannot be read: {one_line(error)[:160]}{end}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, got {type(content).__name__}{end}")
    return content


@contextlib.contextmanager
def as_user_error(
    what: str,
    invalid: type[Exception] | tuple[type[Exception], ...] = (),
    offline: str = "Check the network connection",
    policy: str | None = None,
):
    """Turn the errors of a library that the user can mend into a UserError, `<what>: <reason>`.

    These are a missing package, a failed request to the network or the Hub, a file that cannot be read or written, a dataset
    in another version of LeRobot's format, and the types in `invalid`. All others pass: they are bugs, and a bug needs its
    traceback.

    Args:
        what: the subject of the message, such as "dataset lerobot/pusht".
        invalid: types of error by which the library refuses a value that came from the user.
        offline: what to do when the network does not answer.
        policy: name of the policy of LeRobot's whose packages are needed.

    Raises:
        UserError: one of these errors occurred.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = reason_of(error, offline, policy)
        if reason is None and isinstance(error, invalid):
            reason = one_line(error)[:300]
        if reason is None:
            raise
        raise UserError(f"{what}: {reason}") from error


def reason_of(error: Exception, offline: str, policy: str | None = None) -> str | None:
    """Why a library failed and what to do about it; None if the user cannot mend it.

    transformers and LeRobot raise errors of their own from refused requests and missing packages, which are the reason.
    """
    reason = reason_of_one(error, offline, policy)
    while reason is None and isinstance(error, WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
        reason = reason_of_one(error, offline, policy)
    return reason


def reason_of_one(error: BaseException, offline: str, policy: str | None) -> str | None:
    """As `reason_of`, whatever the error was raised from."""
    from huggingface_hub import errors

    if isinstance(error, ImportError):
        return missing_package(error, policy)
    repo = getattr(error, "repo_id", None)
    if isinstance(error, errors.GatedRepoError):
        if repo is None:
            return "the Hub lets in only who asked. Request access on the repo's page there, then run `hf auth login`"
        return gated_message(repo)
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        subject = "the Hub has no such repo or revision"
        if repo is not None:
            subject += f" ({repo})"
        return f"{subject}. Check the name, or run `hf auth login` if it is private"
    if is_network_error(error):
        return f"the network request failed ({network_reason(error)}). {offline}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "you are not logged in to the Hub. Run `hf auth login`"
    if isinstance(error, (errors.HfHubHTTPError, errors.HFValidationError)):
        return f"the Hub refuses the request ({one_line(error)[:200]})"
    lerobot = sys.modules.get("lerobot.datasets.utils")  # only looked up: importing it takes seconds
    if lerobot is not None and isinstance(error, lerobot.CompatibilityError):
        return one_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {reason_of_disk(error)}"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return reason_of_disk(error)
    return None


def is_network_error(error: BaseException) -> bool:
    """Whether a request did not get through, or was not made because of HF_HUB_OFFLINE."""
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError

    network = (urllib.error.URLError, ConnectionError, TimeoutError, httpx.TransportError)
    network += (LocalEntryNotFoundError,)  # offline, and not in the cache
    # transformers hides the failed request behind an OSError of its own
    return isinstance(error, network) or isinstance(error.__cause__, network)


def network_reason(error: BaseException) -> str:
    """Why a request did not get through, in a few words."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and it is not on this machine"
    return shorten(one_line(error), 120, placeholder=" ...")


def gated_message(repo: str) -> str:
    """That a repo of the Hub is gated, and how to get access."""
    return f"{repo} is gated. Accept its licence on https://huggingface.co/{repo}, then run `hf auth login`"


def missing_package(error: ImportError, policy: str | None) -> str:
    """What to install: the extra of the installed LeRobot that has the packages, if it is known which."""
    named = re.search(r"lerobot\[([\w-]+)\]", str(error))
    extra = None
    if isinstance(policy, str):  # a file may say anything
        extra = lerobot_extra(policy)
    if extra is None and named is not None:
        extra = lerobot_extra(named[1])
    reason = one_line(error)
    if extra is None:
        return f"a package is missing. {reason}"
    reason = re.split(r"[.:]? (?:Please i|I)nstall it with", reason)[0]
    return f"a package is missing ({reason[:200]}). Install it with: {install_extra(extra)}"


def install_extra(extra: str) -> str:
    """The command that installs an extra of LeRobot's, and keeps LeRobot's version."""
    return f'uv pip install "lerobot[{extra}]=={importlib.metadata.version("lerobot")}"'


def lerobot_extra(name: str) -> str | None:
    """The extra of the installed LeRobot for a policy, or for an extra that its messages misspell; None if there is none.

    Policies are called like their extra, but for - and _: multi_task_dit has multi-task-dit, and pi05 has pi.
    """
    extras = importlib.metadata.metadata("lerobot").get_all("Provides-Extra") or []
    letters = {re.sub(r"[^a-z0-9]", "", extra): extra for extra in extras}
    wanted = re.sub(r"[^a-z0-9]", "", name)
    fitting = [plain for plain in letters if wanted.startswith(plain)]
    if not fitting:
        return None
    return letters[max(fitting, key=len)]
