"""The Hugging Face Hub: fetch, push, and its many errors as one line each."""

import contextlib
import re
from pathlib import Path

from config import UserError, one_line

HUB_ID = r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?"


@contextlib.contextmanager
def told_as_user_errors(what: str):
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


def fetch(repo: str, what: str, patterns: list[str] | None = None) -> Path:
    """The folder itself if `repo` is one, else a snapshot of that Hub repo (user/name or user/name@revision)."""
    folder = Path(repo).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(HUB_ID, repo):
        raise UserError(f"{what} {repo}: there is no such folder, and a Hub id is written user/name")
    from huggingface_hub import snapshot_download

    repo_id, _, revision = repo.partition("@")
    with told_as_user_errors(f"{what} {repo}"):
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns))


def create_repo(repo: str) -> None:
    """Have the repo on the Hub before hours of training, not after."""
    from huggingface_hub import HfApi

    with told_as_user_errors(f"--push_to_hub {repo}"):
        HfApi().create_repo(repo, exist_ok=True)


def push(repo: str, output_dir: Path, checkpoint: Path) -> str:
    """Upload the final model files of `output_dir` and its newest checkpoint; returns the repo's address."""
    from huggingface_hub import HfApi

    final = [path.name for path in output_dir.iterdir() if path.is_file() and not path.name.startswith(".")]
    files = [*final, f"{checkpoint.name}/*"]
    with told_as_user_errors(f"--push_to_hub {repo}"):
        commit = HfApi().upload_folder(
            repo_id=repo, folder_path=output_dir, allow_patterns=files, commit_message=f"Armature: {checkpoint.name}"
        )
    return commit.repo_url.url
