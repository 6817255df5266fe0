"""A dataset's files behind a URL, by fsspec: http(s)://, s3://, gs:// or hf://, whole or by ranges of bytes.

A server need not list its folders. A request that fails is tried again for a minute; credentials are those of the library that
fsspec uses for the protocol (s3fs: ~/.aws or AWS_*, gcsfs, huggingface_hub's login).
"""

import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from errors import UserError, one_line, printable

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)  # seconds between the tries of a request
CONNECTIONS = 32
# What says that a file has changed, by protocol; the first that is there counts.
VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime")


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
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @cached_property
    def file_system(self):
        """fsspec's.

        Raises:
            UserError: the protocol is unknown, or its package is not installed.
        """
        import fsspec

        protocol = self.url.partition("://")[0]
        if protocol not in PACKAGES:
            raise UserError(f"dataset {self.url}: expected a URL of {', '.join(PACKAGES)}, got {protocol}://")
        options = {}
        if protocol in ("http", "https"):
            options = {"headers": {"Accept-Encoding": "identity"}}  # a compressed range has other bytes
        try:
            return fsspec.filesystem(protocol, **options)
        except ImportError:
            package = PACKAGES[protocol]
            raise UserError(
                f"dataset {self.url}: reading {protocol}:// needs {package}. Install it with: uv pip install {package}"
            ) from None

    def look_up(self, name: str) -> RemoteFile | None:
        """A file's size and version; None if there is no such file."""
        try:
            info = self._retried(name, lambda: self.file_system.info(f"{self.url}/{name}"))
        except FileNotFoundError:
            return None
        if info.get("size") is None or info.get("type") == "directory":
            raise UserError(f"{self.url}/{name}: the server does not say how large the file is. Download the dataset")
        version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")
        return RemoteFile(int(info["size"]), version)

    def read(self, name: str, size: int) -> bytes:
        """A whole file."""
        return self.read_range(name, 0, size)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file.

        Raises:
            UserError: they cannot be read.
        """

        def request() -> bytes:
            content = self.file_system.cat_file(f"{self.url}/{name}", start=start, end=end)
            if len(content) < end - start:
                raise ConnectionError(f"the answer ends after {len(content)} of {end - start} bytes")
            return content

        if start == end:
            return b""
        try:
            content = self._retried(name, request)
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name} is not there any more. Start again") from None
        if len(content) > end - start:
            raise UserError(
                f"{self.url}/{name}: expected {end - start} bytes, got {len(content)}: the server does not serve ranges. "
                "Download the dataset, or use a server that does"
            )
        return content

    def _retried(self, name: str, request: Callable):
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
                if is_refusal(cause):
                    if isinstance(error, FileNotFoundError):
                        raise FileNotFoundError(name) from None
                    raise UserError(
                        f"{self.url}/{name}: {one_line(cause)[:200]}. Check the URL and your login"
                    ) from error
                if not is_transient(cause):
                    raise
                if wait is None:
                    seconds = time.monotonic() - begun
                    raise UserError(
                        f"{self.url}/{name}: no answer for {seconds:.0f} s ({one_line(cause)[:120]}). Check the connection, "
                        "then pass --resume_from_checkpoint auto"
                    ) from error
                if wait == WAITS[2]:
                    line = f"{self.url} does not answer ({one_line(cause)[:120]}): trying again"
                    print(printable(line), file=sys.stderr, flush=True)
                time.sleep(wait * random.uniform(0.5, 1.0))  # not all requests at once


def is_refusal(error: BaseException) -> bool:
    """Whether a server answered that it will not: there is no such file, or nobody may read it."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))


def is_transient(error: BaseException) -> bool:
    """Whether a request failed by the connection or the server's load: the next may not."""
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(
        names & {"aiohttp", "botocore", "aiobotocore", "httpx", "fsspec", "gcsfs"}
    )


def in_parallel(job: Callable, items: list, bar=None) -> list:
    """The results of a job for each item, in their order, many at a time: each waits for the network."""
    results = []
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
        for result in pool.map(job, items):
            results.append(result)
            if bar is not None:
                bar.update()
    return results
