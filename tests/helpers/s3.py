"""An S3 server on this machine (moto's), with a bucket, behind a proxy that may cut connections."""

from pathlib import Path

import pytest

from helpers.cutting_proxy import CuttingProxy


class Bucket:
    """The bucket `arms` of a server that is started.

    Args:
        monkeypatch: pytest's, for the environment by which libraries find the server.
    """

    def __init__(self, monkeypatch):
        pytest.importorskip("s3fs", reason="needs s3fs")
        server = pytest.importorskip("moto.server", reason="needs moto[server]")
        import boto3

        self.monkeypatch = monkeypatch
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        self.server = server.ThreadedMotoServer(port=0)
        self.server.start()
        _, self.port = self.server.get_host_and_port()
        self.client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1")
        self.client.create_bucket(Bucket="arms")
        self.proxy = None

    def upload(self, folder: Path, bytes_between_cuts: int = 2**40) -> str:
        """Upload a folder; returns its URL, which is read through a proxy that cuts after that many bytes of answers."""
        import fsspec

        for path in folder.rglob("*"):
            if path.is_file():
                self.client.upload_file(str(path), "arms", f"{folder.name}/{path.relative_to(folder).as_posix()}")
        self.proxy = CuttingProxy(self.port, bytes_between_cuts)
        self.monkeypatch.setenv("AWS_ENDPOINT_URL", self.proxy.url)
        fsspec.filesystem("s3").clear_instance_cache()
        return f"s3://arms/{folder.name}"

    def close(self) -> None:
        if self.proxy is not None:
            self.proxy.close()
        self.server.stop()
