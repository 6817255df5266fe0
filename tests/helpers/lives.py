"""Lives of a training run: started, killed, started again. Imports once, then forks a process for each life.

    python tests/helpers/lives.py SETTINGS.json signal SIGKILL 7    killed at random moments, drawn with seed 7
    python tests/helpers/lives.py SETTINGS.json operation 3 40      killed before the 3rd file operation of its first save,
                                                                    then before the 40th
    python tests/helpers/lives.py SETTINGS.json replaced 4 7        four times its folder is deleted or moved at a random moment,
                                                                    and another life begins in its place

After every life, each checkpoint-* folder must be complete. The last life is not killed. Prints one JSON line for each life.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from checkpoints.folder import find_checkpoints, verify

FILE_EVENTS = {
    "open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile",
}  # fmt: skip
STARTED = "saves to"  # what a run prints once it has imported, read and built everything: from here on it trains


def die_before(operation: int, output_dir: str) -> None:
    """Make this process kill itself just before its n-th operation on the files of a checkpoint that it writes."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event in FILE_EVENTS and f"{output_dir}/.checkpoint-" in str(args[0]) + str(args[1:2]):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start_life(settings: dict, operation: int | None) -> int:
    """Start one life in a process of its own, and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        from train import main

        output = os.open(settings["output_dir"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if operation is not None:
            die_before(operation, settings["output_dir"])
        status = main({"resume_from_checkpoint": "auto", **settings})
    finally:
        os._exit(status)


def record_end(settings: dict, operation: int | None, status: int) -> int:
    """Print how a life ended, and return the step of its newest checkpoint."""
    output_dir = Path(settings["output_dir"])
    for path in output_dir.glob("checkpoint-*"):
        verify(path)
    steps = [int(path.name.split("-")[1]) for path in find_checkpoints(output_dir)]
    line = {"status": os.waitstatus_to_exitcode(status), "operation": operation, "checkpoints": steps}
    print(json.dumps(line), flush=True)
    return max(steps, default=0)


def whole_life(settings: dict, operation: int | None) -> None:
    _, status = os.waitpid(start_life(settings, operation), 0)
    record_end(settings, operation, status)


def times_started(settings: dict) -> int:
    log = Path(settings["output_dir"] + ".log")
    return log.read_text().count(STARTED) if log.exists() else 0


def killed_at_random(settings: dict, number: int, seed: int) -> None:
    """Lives that a signal ends at a random moment of their training, until one reaches the end of the run."""
    rng = random.Random(seed)
    longest = 3.0  # seconds of a life
    newest = 0  # step that the lives so far have saved
    while True:
        before = times_started(settings)
        pid = start_life(settings, None)
        ended = 0
        while not ended and times_started(settings) == before:
            time.sleep(0.01)
            ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(rng.uniform(0, longest))
        if not ended:
            os.kill(pid, number)
            _, status = os.waitpid(pid, 0)
        step = record_end(settings, None, status)
        if step <= newest:
            longest *= 1.2  # a slow machine needs longer lives to reach a save
        newest = step
        if os.waitstatus_to_exitcode(status) == 0:
            return


def replaced_at_random(settings: dict, trials: int, seed: int) -> None:
    """Lives whose folder is taken away at a random moment, and at once begun again by another life, which is not disturbed."""
    rng = random.Random(seed)
    output_dir = Path(settings["output_dir"])
    for trial in range(trials):
        shutil.rmtree(output_dir, ignore_errors=True)
        before = times_started(settings)
        first = start_life(settings, None)
        while times_started(settings) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.0))
        output_dir.rename(output_dir.with_name(f"moved {trial}"))
        if trial % 2:
            shutil.rmtree(output_dir.with_name(f"moved {trial}"), ignore_errors=True)
        second = start_life(settings, None)
        _, status = os.waitpid(first, 0)
        print(
            json.dumps({"status": os.waitstatus_to_exitcode(status), "operation": None, "checkpoints": []}), flush=True
        )
        _, status = os.waitpid(second, 0)
        record_end(settings, None, status)


def main(path: str, how: str, *args: str) -> None:
    import train  # noqa: F401  imported once, for every life

    gc.freeze()  # no collection in a forked process goes over what the import made

    settings = json.loads(Path(path).read_text())
    if how == "operation":
        for operation in args:
            whole_life(settings, int(operation))
        whole_life(settings, None)
    elif how == "replaced":
        replaced_at_random(settings, *map(int, args))
    else:
        name, seed = args
        killed_at_random(settings, getattr(signal, name), int(seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
