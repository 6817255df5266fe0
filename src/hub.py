"""The Hugging Face Hub: fetch from it, and upload to it without ever ending a run for it."""

import contextlib
import re
import threading
import time
from pathlib import Path

from errors import UserError, as_user_error, find_path, gated_message, is_network_error, one_line

WAITS = (5.0, 30.0)  # seconds between the tries of an upload
HUB_ID = r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?"  # user/name or user/name@revision
ONLINE = "Check the path, or try again online"
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "policy.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx")


def fetch(repo: str, what: str, *, weights: bool = True) -> Path:
    """A folder, or the snapshot of a Hub repo without its checkpoints and logs.

    Args:
        repo: a folder, user/name or user/name@revision.
        what: the flag or noun that messages call it by.
        weights: whether to download the weights too, which are nearly all of its bytes.

    Raises:
        UserError: there is neither, or the Hub cannot be reached.
    """
    folder = find_path(repo, what)
    if folder is not None and folder.is_dir():
        return folder
    repo_id, revision = parse_hub_id(repo, what)
    from huggingface_hub import snapshot_download

    unwanted = ["checkpoint-*/*", "tensorboard/*"]
    if not weights:
        unwanted += [*WEIGHTS, *(f"*/{pattern}" for pattern in WEIGHTS)]
    offline = f"Check the path, or run this online once: {download_command(repo)}"
    with as_user_error(f"{what} {repo} (no local folder)", offline=offline):
        return Path(snapshot_download(repo_id, revision=revision, ignore_patterns=unwanted))


def require_repos(needs: dict[str, bool], what: str) -> None:
    """Refuse repos that are neither on this machine nor available from the Hub, in one message, before any download.

    Args:
        needs: {Hub id: whether its weights are needed, in addition to its settings and tokenizer}.
        what: what needs them, to begin the message.

    Raises:
        UserError: a repo is gated or does not exist, or the Hub cannot be reached.
    """
    problems = []
    unreachable = {}  # {repo: the command that downloads it}
    for repo, weights in needs.items():
        if is_downloaded(repo, weights):
            continue
        try:
            request_file(repo)
        except UserError as error:
            if is_network_error(error.__cause__):
                unreachable[repo] = download_command(repo, weights)
            else:
                problems.append(str(error))
    if unreachable:
        from huggingface_hub import constants

        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        problems.append(
            f"{reason}, and the files needed of {' and '.join(unreachable)} are not on this machine. Run this online "
            f"once: {' && '.join(unreachable.values())}"
        )
    if problems:
        raise UserError(f"{what}: {'. '.join(problems)}")


def download_command(repo: str, weights: bool = True) -> str:
    """The command that downloads a repo, with or without its weights."""
    repo_id, _, revision = repo.partition("@")
    command = f"hf download {repo_id}"
    if revision:
        command += f" --revision {revision}"
    if not weights:
        command += " --exclude '*.safetensors'"
    return command


def is_downloaded(repo: str, weights: bool) -> bool:
    """Whether the cache has files of a repo, and among them its weights if these are needed."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    files = [path for path in folder.rglob("*") if path.is_file()]
    if weights:
        files = [path for path in files if path.suffix in (".safetensors", ".bin")]
    return bool(files)


def request_file(repo: str) -> None:
    """Ask the Hub for the metadata of a file, as a download does first. The file need not exist.

    Raises:
        UserError: the repo is gated or does not exist, or the Hub cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    with as_user_error(repo), contextlib.suppress(EntryNotFoundError):
        try:
            get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=20)
        except GatedRepoError as error:
            raise UserError(gated_message(repo)) from error


def newest_checkpoint(repo: str, what: str, sort_key) -> Path:
    """Download the newest complete checkpoint-<step> of a Hub repo.

    Args:
        repo: user/name or user/name@revision.
        what: the flag that messages call it by.
        sort_key: function of a folder that holds trainer_state.json; largest for the newest checkpoint.

    Raises:
        UserError: the repo holds no checkpoint, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    repo_id, revision = parse_hub_id(repo, what)
    with as_user_error(f"{what} {repo} (no local folder)", offline=ONLINE):
        files = HfApi().list_repo_files(repo_id, revision=revision)
        complete = [file.split("/")[0] for file in files if re.fullmatch(r"checkpoint-\d+/manifest\.json", file)]
        if not complete:
            raise UserError(f"{what} {repo}: the Hub repo holds no checkpoint-<step> folder. Pass another repo")
        # first the small files that show which is newest, then only that checkpoint
        states = [f"{name}/trainer_state.json" for name in complete]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=states))
        newest = max((folder / name for name in complete), key=sort_key)
        snapshot_download(repo_id, revision=revision, allow_patterns=[f"{newest.name}/*"])
        return newest


def parse_hub_id(repo: str, what: str) -> tuple[str, str | None]:
    """(user/name, revision or None) of user/name@revision.

    Raises:
        UserError: it is not of that form.
    """
    if not re.fullmatch(HUB_ID, repo):
        raise UserError(f"{what} {repo}: expected an existing folder, or a Hub id written user/name")
    repo_id, _, revision = repo.partition("@")
    return repo_id, revision or None


def check_login(repo: str) -> None:
    """Refuse --push_to_hub early, before training.

    Raises:
        UserError: `repo` is not written user/name, nobody is logged in, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    if "@" in repo or not re.fullmatch(HUB_ID, repo):
        raise UserError(f"--push_to_hub {repo}: expected a Hub id written user/name")
    with as_user_error(f"--push_to_hub {repo}"):
        HfApi().whoami()


def create_repo(repo: str) -> None:
    """Create the repo on the Hub if it does not exist.

    Raises:
        UserError: the Hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with as_user_error(f"--push_to_hub {repo}"):
        HfApi().create_repo(repo, exist_ok=True)


def push(repo: str, output_dir: Path, checkpoint: Path, warn) -> str | None:
    """Upload the finished policy in `output_dir` and its last checkpoint.

    Args:
        warn: called with a line if the upload fails for good.

    Returns:
        The repo's address; None if the upload failed.
    """
    from huggingface_hub import HfApi

    finished = [path.name for path in output_dir.iterdir() if path.is_file() and not path.name.startswith(".")]

    def upload() -> str:
        if checkpoint.resolve().parent != output_dir.resolve():  # resumed from elsewhere with no step left to do
            upload_checkpoint(repo, checkpoint)
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=output_dir,
            allow_patterns=[*finished, f"{checkpoint.name}/*"],
            commit_message=f"Armature: {checkpoint.name}",
        )
        return commit.repo_url.url

    remedy = f"The run is complete in {output_dir}. Upload it with: hf upload {repo} {output_dir}"
    return retried(f"--push_to_hub {repo}", remedy, warn, upload)


def upload_checkpoint(repo: str, checkpoint: Path) -> None:
    from huggingface_hub import HfApi

    HfApi().upload_folder(
        repo_id=repo,
        folder_path=checkpoint,
        path_in_repo=checkpoint.name,
        commit_message=f"Armature: {checkpoint.name}",
    )


def retried(what: str, remedy: str, warn, upload, *args):
    """The result of `upload(*args)`, tried again after each of WAITS; warns and returns None if the last try fails."""
    for wait in (*WAITS, 0.0):
        try:
            with as_user_error(what):
                return upload(*args)
        except UserError as error:
            reason = str(error)
        except Exception as error:  # hf_xet's are RuntimeErrors; whatever it is, an upload never ends a run
            reason = f"{what}: {type(error).__name__}: {one_line(error)}"
        time.sleep(wait)
    warn(f"{reason[:300]}. {remedy}")
    return None


class Uploader:
    """Uploads checkpoints in a thread, one at a time. The run neither waits for it nor fails with it.

    A checkpoint that is still waiting when a newer one arrives is skipped. The thread is a daemon, unlike that of
    huggingface_hub's `run_as_future`, which keeps the process alive until the upload has ended.

    Args:
        repo: user/name.
        warn: called with a line if an upload fails for good.
    """

    def __init__(self, repo: str, warn):
        self.repo = repo
        self.warn = warn
        self.lock = threading.Lock()  # guards the three below
        self.waiting: Path | None = None
        self.uploading: Path | None = None
        self.thread: threading.Thread | None = None

    @property
    def in_use(self) -> list[Path]:
        """Checkpoints that must not be deleted now."""
        with self.lock:
            return [path for path in (self.waiting, self.uploading) if path is not None]

    def put(self, checkpoint: Path) -> None:
        """Upload this checkpoint next."""
        with self.lock:
            self.waiting = checkpoint
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="uploader", daemon=True)
                self.thread.start()

    def _run(self) -> None:
        checkpoint = self._next()
        while checkpoint is not None:
            what = f"--push_checkpoints: {checkpoint.name}"
            remedy = "It stays on disk, and the next checkpoint is tried"
            retried(what, remedy, self.warn, upload_checkpoint, self.repo, checkpoint)
            checkpoint = self._next()

    def _next(self) -> Path | None:
        """Take the waiting checkpoint; if there is none, the thread ends."""
        with self.lock:
            self.uploading = self.waiting
            self.waiting = None
            if self.uploading is None:
                self.thread = None
            return self.uploading

    def close(self, seconds: float) -> None:
        """Wait for the uploads that have begun or are waiting, but at most this long. Warn of those that have not ended."""
        with self.lock:
            thread = self.thread
        if thread is not None:
            thread.join(seconds)
        for checkpoint in self.in_use:
            self.warn(
                f"--push_checkpoints: the upload of {checkpoint.name} has not ended, and ends with this process. Upload it "
                f"with: hf upload {self.repo} {checkpoint} {checkpoint.name}"
            )
