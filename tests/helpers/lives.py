"""Lives of a training run: started, killed, started again. Imports once, then forks a process for each life.

    python tests/helpers/lives.py SETTINGS.json signal SIGKILL 7      killed at random moments (of seed 7)
    python tests/helpers/lives.py SETTINGS.json operation 3 40        killed before the 3rd, then the 40th file operation of its first save

After every life each checkpoint-* folder has to be whole. Ends with a life that is left alone; prints one JSON line a life.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from checkpoints.folder import find_checkpoints, verify

EVENTS = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def die_before(operation: int, output_dir: str) -> None:
    """Have this process kill itself just before its n-th operation on files of a checkpoint being written."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event in EVENTS and f"{output_dir}/.checkpoint-" in str(args[0]) + str(args[1:2]):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def live(settings: dict, operation: int | None) -> int:
    """One life in a process of its own; its pid."""
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


def tell(settings: dict, died: int | None, status: int) -> int:
    """Say how a life ended; the step of its newest checkpoint."""
    output_dir = Path(settings["output_dir"])
    for path in output_dir.glob("checkpoint-*"):
        verify(path)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    steps = [int(path.name.split("-")[1]) for path in find_checkpoints(output_dir)]
    print(json.dumps({"status": code, "operation": died, "checkpoints": steps}), flush=True)
    return max(steps, default=0)


def main(path: str, how: str, *args: str) -> None:
    import train  # noqa: F401  imported once, for every life

    settings = json.loads(Path(path).read_text())
    if how == "operation":
        for operation in map(int, args):
            tell(settings, operation, os.waitpid(live(settings, operation), 0)[1])
    else:
        number, rng = getattr(signal, args[0]), random.Random(int(args[1]))
        log, start = Path(settings["output_dir"] + ".log"), "saves to"
        longest, newest = 3.0, 0  # seconds of a life, and what the last ones have saved
        while True:
            begun = log.read_text().count(start) if log.exists() else 0
            pid = live(settings, None)
            done = (0, 0)
            while done[0] == 0 and (log.read_text().count(start) if log.exists() else 0) == begun:
                time.sleep(0.01)  # until it has imported, read and built all: from here on it trains
                done = os.waitpid(pid, os.WNOHANG)
            time.sleep(rng.uniform(0, longest))
            if done[0] == 0:
                os.kill(pid, number)
                done = os.waitpid(pid, 0)
            before, newest = newest, tell(settings, None, done[1])
            longest *= 1 if newest > before else 1.2  # on a slow machine too one has to come to a save
            if os.WIFEXITED(done[1]) and os.WEXITSTATUS(done[1]) == 0:
                return
    tell(settings, None, os.waitpid(live(settings, None), 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
