"""The Hugging Face Hub: fetch, push, and its many errors as one line each."""

import functools
import re
import threading
import time
from pathlib import Path

from errors import UserError, hub_errors, one_line

WAITS = (5.0, 30.0)  # seconds between tries of an upload
HUB_ID = r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?"


def fetch(repo: str, what: str) -> Path:
    """The folder itself if `repo` is one, else a snapshot of that Hub repo (user/name or user/name@revision), its final files alone."""
    folder = Path(repo).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(HUB_ID, repo):
        raise UserError(f"{what} {repo}: there is no such folder, and a Hub id is written user/name")
    from huggingface_hub import snapshot_download

    repo_id, _, revision = repo.partition("@")
    with hub_errors(f"{what} {repo}"):
        not_needed = ["checkpoint-*/*", "tensorboard/*"]
        return Path(snapshot_download(repo_id, revision=revision or None, ignore_patterns=not_needed))


def create_repo(repo: str) -> None:
    """Have the repo on the Hub before hours of training, not after."""
    from huggingface_hub import HfApi

    if "@" in repo or not re.fullmatch(HUB_ID, repo):
        raise UserError(f"--push_to_hub {repo}: a Hub id is written user/name")
    with hub_errors(f"--push_to_hub {repo}"):
        HfApi().create_repo(repo, exist_ok=True)


def newest_checkpoint(repo: str, what: str, sort_key) -> Path:
    """The newest complete checkpoint-<step> of a Hub repo (user/name or user/name@revision), that folder alone, on disk.

    Args:
        sort_key: of a folder with its trainer_state.json, what is largest for the newest.

    Raises:
        UserError: the repo holds none, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    if not re.fullmatch(HUB_ID, repo):
        raise UserError(f"{what} {repo}: there is no such folder, and a Hub id is written user/name")
    repo_id, _, revision = repo.partition("@")
    with hub_errors(f"{what} {repo}"):
        files = HfApi().list_repo_files(repo_id, revision=revision or None)
        whole = [file.split("/")[0] for file in files if re.fullmatch(r"checkpoint-\d+/manifest\.json", file)]
        if not whole:
            raise UserError(f"{what} {repo}: that Hub repo holds no checkpoint-<step> folder")
        states = [f"{name}/trainer_state.json" for name in whole]
        folder = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=states))
        newest = max((folder / name for name in whole), key=sort_key)
        snapshot_download(repo_id, revision=revision or None, allow_patterns=[f"{newest.name}/*"])
        return newest


def push(repo: str, output_dir: Path, checkpoint: Path, warn) -> str | None:
    """Upload the final model files of `output_dir` and its newest checkpoint; the repo's address, None where that failed for good."""
    from huggingface_hub import HfApi

    final = [path.name for path in output_dir.iterdir() if path.is_file() and not path.name.startswith(".")]
    files, message = [*final, f"{checkpoint.name}/*"], f"Armature: {checkpoint.name}"

    def upload() -> str:
        to = {"repo_id": repo, "commit_message": message}
        if checkpoint.resolve().parent != output_dir.resolve():  # a run that had nothing to do
            HfApi().upload_folder(**to, folder_path=checkpoint, path_in_repo=checkpoint.name)
        return HfApi().upload_folder(**to, folder_path=output_dir, allow_patterns=files).repo_url.url

    return attempt(upload, f"--push_to_hub {repo}", warn, f"all is in {output_dir}: hf upload {repo} {output_dir}")


def attempt(upload, what: str, warn, remedy: str):
    """What `upload()` returns; it is tried again after each of WAITS seconds, and then message, not raised."""
    for wait in (*WAITS, None):
        try:
            with hub_errors(what):
                return upload()
        except Exception as error:  # whatever it is, the run does not fail for it
            if wait is None:
                warn(f"{one_line(error)[:300]}; {remedy}")
            else:
                time.sleep(wait)
    return None


class Uploader:
    """Uploads checkpoints as they are made, in a thread, one at a time; the run neither waits for it nor fails with it.

    A checkpoint that still waits when a newer one is made is passed over.

    Args:
        repo: user/name.
        warn: called with a line for people.
    """

    def __init__(self, repo: str, warn):
        self.repo, self.warn = repo, warn
        self.waiting: Path | None = None
        self.uploading: Path | None = None
        self.changed, self.ended = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self.thread.start()

    @property
    def in_use(self) -> list[Path]:
        """Checkpoints that are not to be deleted now."""
        with self.changed:
            return [path for path in (self.waiting, self.uploading) if path is not None]

    def put(self, checkpoint: Path) -> None:
        with self.changed:
            self.waiting = checkpoint
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.uploading = None
                self.changed.wait_for(lambda: self.waiting is not None or self.ended)
                if self.waiting is None:
                    return
                path, self.waiting, self.uploading = self.waiting, None, self.waiting
            what, remedy = f"--push_checkpoints: {path.name}", "it stays on disk, and the next one is tried"
            attempt(functools.partial(self._upload, path), what, self.warn, remedy)

    def _upload(self, path: Path) -> None:
        from huggingface_hub import HfApi

        message = f"Armature: {path.name}"
        HfApi().upload_folder(repo_id=self.repo, folder_path=path, path_in_repo=path.name, commit_message=message)

    def close(self, seconds: float) -> None:
        """Let what is under way end, for at most so many seconds."""
        with self.changed:
            self.ended = True
            self.changed.notify()
        self.thread.join(seconds)
