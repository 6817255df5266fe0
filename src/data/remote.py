"""A dataset's files behind a URL, by fsspec: http(s)://, s3://, gs:// or hf://, whole or by ranges of bytes.

A server need not list its folders. A request that fails is tried again for a minute; credentials are those of the library that
fsspec uses for the protocol (s3fs: ~/.aws or AWS_*, gcsfs, huggingface_hub's login).
"""

import copy
import random
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from errors import UserError, one_line, printable

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)  # seconds between the tries of a request
CONNECT_SECONDS = 15
ANSWER_SECONDS = 30  # without a byte, after which a request is tried again
CONNECTIONS = 32
# What says that a file has changed, by protocol; the first that is there counts.
VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime")
# The packages whose errors may be of the connection, and those of their errors that are not.
NETWORK_PACKAGES = {"aiohttp", "botocore", "aiobotocore", "httpx", "httpcore", "fsspec", "gcsfs", "requests"}
REFUSALS = {"NoCredentialsError", "PartialCredentialsError", "InvalidURL", "UnsupportedProtocol"}


def is_remote(dataset_id: str) -> bool:
    """Whether a dataset's name is a URL."""
    return "://" in dataset_id


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file: its size in bytes, and a text that differs once it has changed."""

    size: int
    version: str


class RemoteFolder:
    """The folder of a dataset at a URL. Any thread may read.

    Args:
        url: with its protocol.

    Raises:
        UserError: it is not such a URL.
    """

    is_local = False

    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        self.protocol = scheme.lower()
        self.url = f"{self.protocol}://{rest.rstrip('/')}"
        self.stopped = threading.Event()  # requests that fail are not tried again
        wrong = None
        if self.protocol not in PACKAGES:
            wrong = f"expected a URL of {', '.join(PACKAGES)}, got {scheme}://"
        elif not self.url.isprintable() or not rest.strip("/"):
            wrong = "expected a URL with a host and a folder"
        elif self.is_http and urllib.parse.urlsplit(self.url).query:
            wrong = "expected the URL of a folder, got one with a query"
        elif self.is_http and "@" in urllib.parse.urlsplit(self.url).netloc:
            wrong = "expected a URL without a password, which would be written into the checkpoints"
        if wrong is not None:
            name = url.partition("@")[2] if "@" in url else url
            raise UserError(f"dataset {name}: {wrong}. Check the URL")

    def reopened(self) -> "RemoteFolder":
        """The same folder, with tries that are stopped apart from this one's."""
        other = copy.copy(self)
        other.stopped = threading.Event()
        return other

    @property
    def is_http(self) -> bool:
        return self.protocol in ("http", "https")

    @cached_property
    def file_system(self):
        """fsspec's.

        Raises:
            UserError: the protocol's package is not installed.
        """
        import fsspec

        options = {}
        try:
            if self.is_http:
                import aiohttp

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
                # A compressed range has other bytes.
                options = {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"timeout": timeout}}
            if self.protocol == "s3":
                options = {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}}
            return fsspec.filesystem(self.protocol, **options)
        except ImportError:
            package = PACKAGES[self.protocol]
            raise UserError(
                f"dataset {self.url}: reading {self.protocol}:// needs {package}. Install it with: uv pip install {package}"
            ) from None

    def look_up(self, name: str) -> RemoteFile | None:
        """A file's size and version; None if there is no such file."""
        try:
            info = self.retried(name, lambda: self.file_system.info(f"{self.url}/{name}"))
        except FileNotFoundError:
            return None
        if info.get("size") is None or info.get("type") == "directory":
            raise UserError(f"{self.url}/{name}: the server does not say how large the file is. Download the dataset")
        version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")
        return RemoteFile(int(info["size"]), version)

    def listing(self, folder: str) -> list[str] | None:
        """The names of all files below a folder; None where the protocol has no listing."""
        if self.is_http:
            return None
        try:
            found = self.retried(folder, lambda: self.file_system.find(f"{self.url}/{folder}"))
        except FileNotFoundError:
            return []
        return [f"{folder}/{path.rpartition(f'/{folder}/')[2]}" for path in found]

    def check_ranges(self, name: str) -> None:
        """Raise a UserError if the server answers with more than was asked for, before something large is asked for."""
        self.read_range(name, 0, 1)

    def read_range(self, name: str, start: int, end: int, version: str = "") -> bytes:
        """The bytes [start, end) of a file.

        Args:
            version: of `look_up`; an HTTP server is asked to refuse if the file is another by now.

        Raises:
            UserError: they cannot be read.
        """
        options = {}
        if self.is_http and version.startswith('"'):  # an ETag by which it can compare
            options = {"headers": {"Accept-Encoding": "identity", "If-Match": version}}

        def request() -> bytes:
            content = self.file_system.cat_file(f"{self.url}/{name}", start=start, end=end, **options)
            if len(content) < end - start:
                raise ConnectionError(f"the answer ends after {len(content)} of {end - start} bytes")
            return content

        if start == end:
            return b""
        try:
            content = self.retried(name, request)
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name} is not there any more. Start again") from None
        if len(content) > end - start:
            raise UserError(
                f"{self.url}/{name}: expected {end - start} bytes, got {len(content)}: the server does not serve ranges. "
                "Download the dataset, or use a server that does"
            )
        return content

    def retried(self, name: str, request: Callable):
        """The result of a request, tried again while the connection fails.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it is refused, or the connection does not come back.
        """
        begun = time.monotonic()
        for wait in (*WAITS, None):
            try:
                return request()
            except Exception as error:
                cause = error.__cause__ or error  # fsspec takes any failure to look up a file for a missing file
                reason = one_line(cause)[:160]
                if status_of(cause) == 412:
                    raise UserError(
                        f"{self.url}/{name} has changed on the server since it was opened. Start again"
                    ) from error
                if is_refusal(cause):
                    if isinstance(error, FileNotFoundError):
                        raise FileNotFoundError(name) from None
                    raise UserError(f"{self.url}/{name}: {reason}. Check the URL and your login") from error
                if not is_transient(cause) and not is_transient(error):
                    raise
                if wait is None or self.stopped.is_set():
                    seconds = time.monotonic() - begun
                    raise UserError(
                        f"{self.url}/{name}: no answer for {seconds:.0f} s ({reason}). Check the connection, then start again "
                        "(with --resume_from_checkpoint auto, if there is a checkpoint)"
                    ) from error
                if wait == WAITS[2]:
                    print(
                        printable(f"{self.url} does not answer ({reason}): trying again"), file=sys.stderr, flush=True
                    )
                self.stopped.wait(wait * random.uniform(0.5, 1.0))  # not all requests at once


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an answer that a library raised as an error."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def is_refusal(error: BaseException) -> bool:
    """Whether a server answered that it will not: there is no such file, or nobody may read it. Also a lack of credentials."""
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    if type(error).__name__ in REFUSALS:
        return True
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))


def is_transient(error: BaseException) -> bool:
    """Whether a request failed by the connection or the server's load: the next may not."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & NETWORK_PACKAGES)


def in_parallel(job: Callable, items: list, bar=None) -> list:
    """The results of a job for each item, in their order, many at a time: each waits for the network."""
    results = []
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
        for result in pool.map(job, items):
            results.append(result)
            if bar is not None:
                bar.update()
    return results
