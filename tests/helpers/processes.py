"""Runs of several processes for the tests: imports once, then forks the processes of each run as a launcher would.

Reads a run a line, {"settings": {...}, "processes": 2, "env": {...}, "kill": [rank, seconds, "SIGKILL"]}, and answers each with a
line, the processes' exit statuses. What they print goes to <output_dir>.log. Names in `env` that are for these processes:
SLOW_DISK, seconds that each flush takes the main one; BREAK_RANK_1, an error that the other one raises in its first step;
BREAK_LOADER_1, the step before which the other one's data cannot be read; SIMULATION, the longest episode of a simulation
in place of --eval_env; TELL_WORK, to print which process hashes a file and which makes the simulation.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1]))


def start(settings: dict, rank: int, processes: int, port: int, env: dict) -> int:
    """One process of a run; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        os.environ.update({name: str(value) for name, value in {**place, **env}.items()})
        output = os.open(settings["output_dir"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import torch

        from checkpoints import folder
        from helpers.simulations import still_simulation
        from train import main
        from training import evaluation
        from training.learner import Learner

        torch.set_num_threads(1)
        if rank == 0 and "SLOW_DISK" in os.environ:
            os.fsync = lambda handle: time.sleep(float(os.environ["SLOW_DISK"]))
        if rank == 1 and "BREAK_RANK_1" in os.environ:
            Learner.forward = broken_forward
        if rank == 1 and "BREAK_LOADER_1" in os.environ:
            break_loader(int(os.environ["BREAK_LOADER_1"]))
        if "SIMULATION" in os.environ:
            simulation = still_simulation(lambda: time.sleep(0.01), int(os.environ["SIMULATION"]))
            evaluation.environments.open_simulation = lambda *args, **kwargs: simulation
        if "TELL_WORK" in os.environ:
            tell_calls(folder, "sha256", rank)
            tell_calls(evaluation.environments, "open_simulation", rank)
        status = main(settings)
        there = sorted(path.name for path in Path(settings["output_dir"]).glob("checkpoint-*"))
        print(f"process {rank} left", *there, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def broken_forward(learner, batch: dict):
    import torch

    raise torch.distributed.DistBackendError(os.environ["BREAK_RANK_1"])


def break_loader(step: int) -> None:
    from data.loader import Loader
    from errors import UserError

    batch_at = Loader.batch_at

    def broken(loader, samples_seen, buffers=None):
        if samples_seen == step * loader.batch_size:
            raise UserError("frame 7 cannot be decoded")
        return batch_at(loader, samples_seen, buffers)

    Loader.batch_at = broken


def tell_calls(module, name: str, rank: int) -> None:
    """Print every call of a function."""
    function = getattr(module, name)

    def told(*args, **kwargs):
        print(f"process {rank} calls {name}", flush=True)
        return function(*args, **kwargs)

    setattr(module, name, told)


def end(pids: list[int], kill: list | None, begun: Path) -> list[int]:
    """The statuses of the processes; one of them is sent a signal so many seconds after `begun` holds a first line of metrics."""
    if kill:
        rank, seconds, name = kill
        while not (begun.exists() and begun.stat().st_size):
            time.sleep(0.02)
        time.sleep(seconds)
        os.kill(pids[rank], getattr(signal, name))
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def stop(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    import train  # noqa: F401  once, for every run

    gc.freeze()  # no collection in a forked process goes over what the import made

    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings, processes = job["settings"], job["processes"]
        pids = [start(settings, rank, processes, port, job["env"]) for rank in range(processes)]
        watchdog = threading.Timer(120, stop, [pids])
        watchdog.start()
        codes = end(pids, job.get("kill"), Path(settings["output_dir"]) / "metrics.jsonl")
        watchdog.cancel()
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
