"""Fixtures of the whole suite: datasets to test on, a cache of its own, a renderer.

ARMATURE_TESTS_WITHOUT_TORCHCODEC=1 tests as on a machine without FFmpeg's libraries, where PyAV decodes video.
"""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # with -n: each worker, and each process that it starts, computes on one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest.register_assert_rewrite("helpers")  # its assertions show their values too

from helpers.paths import REAL, ROOT, WITHOUT_TORCHCODEC  # noqa: E402
from helpers.recording import record, usual_scheduling  # noqa: E402
from helpers.s3 import Bucket  # noqa: E402


def pytest_configure(config):
    """A warning from any module of ours is an error; those of libraries stay warnings."""
    ours = "|".join(path.stem for path in sorted((ROOT / "src").iterdir()) if not path.name.startswith("_"))
    config.addinivalue_line("filterwarnings", rf"error:::({ours})(\..*)?$")
    if os.environ.get("ARMATURE_TESTS_WITHOUT_TORCHCODEC") == "1":
        hide_torchcodec()


def pytest_terminal_summary(terminalreporter):
    """The table of docs/resume.md: how many times runs were stopped, and after how many they were still the same runs."""
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            trials = dict(report.user_properties).get("trials") if report.when == "call" else None
            if trials:
                kind, count = trials
                rows.append(f"| {kind} | {count} | {count if outcome == 'passed' else 0} |")
    if rows:
        terminalreporter.write_line("\n".join(["| how it was stopped | times | exact |", "| --- | --- | --- |", *rows]))


def hide_torchcodec() -> None:
    """Put a torchcodec that cannot be loaded before the installed one, here and in the processes that tests start."""
    sys.path.insert(0, str(WITHOUT_TORCHCODEC))
    inherited = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WITHOUT_TORCHCODEC), inherited]))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Decoded frames of tests stay out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["XDG_CACHE_HOME"]) / "armature" / "frames"


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Keep what the imports made out of garbage collections: each takes 0.25 s with LeRobot imported, and each run asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cr5():
    if not (REAL / "cr5_banana").is_dir():
        pytest.skip(f"no real data: {REAL}/cr5_banana is missing (ARMATURE_REAL_DATA names its folder)")
    return REAL / "cr5_banana"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """name -> folder of a dataset made once a session."""
    kinds = {
        "video": {},
        "two_cameras": {"cameras": ("top", "wrist")},
        "many_files": {"cameras": ("top", "wrist"), "files_mb": 0.001},
        "images": {"video": False},
        "front": {"cameras": ("front",)},
        "no_camera": {"cameras": ()},
        "wide": {"state_dims": 5, "lengths": (5, 5)},
    }
    folders = {}

    def make(name: str) -> Path:
        if name not in folders:
            with usual_scheduling():
                folders[name] = record(tmp_path_factory.mktemp("made") / name, **kinds[name])
        return folders[name]

    return make


@pytest.fixture
def copy_of(tmp_path, made):
    """A copy of a made dataset to break."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(made(name), tmp_path / name))

    return copy


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket(monkeypatch)
    yield bucket
    bucket.close()


@pytest.fixture
def mount(tmp_path):
    """Options -> a folder that is a file system of its own in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
        if os.name == "nt" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
            pytest.skip("a small tmpfs can be mounted by root on Linux only")
        return folder

    yield make
    subprocess.run(["umount", "--quiet", "--lazy", folder], check=False)  # a file in it may still be mapped


@pytest.fixture(scope="session")
def renderer():
    from errors import UserError
    from sim.rendering import pick_renderer

    try:
        return pick_renderer()
    except UserError as error:
        pytest.skip(str(error))
