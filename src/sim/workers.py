"""Episodes in parallel processes. Each has one policy and one renderer, for all tasks, as starting one takes seconds."""

import contextlib
import functools
import multiprocessing
import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker

from errors import UserError

# A fork of a process that has rendered, or used a GPU, hangs. A fork server has only imported, once for all workers.
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@dataclass(frozen=True)
class Job:
    """An episode to run: of a task, from a seed, with the images of all its steps or only the last."""

    task: str | None
    seed: int
    film: bool


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_server(module: str) -> None:
    """Let the process that workers are forked from begin to import `module`, while this one does something else."""
    if START != "forkserver":
        return
    multiprocessing.set_forkserver_preload([module])
    # Ctrl-C reaches all processes of a terminal. The workers inherit that they do not hear it: this process stops them.
    resource_tracker.ensure_running()  # starting it ends with SIGINT heard
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


class InProcess:
    """Runs jobs one after another in this process, as `Workers` does in several."""

    def __init__(self, make_runner: Callable):
        self.runner = make_runner()
        self.waiting: list[Job] = []

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    def next(self) -> tuple:
        job = self.waiting.pop(_choose(self.waiting, self.runner.task, at=Counter()))
        return job, self.runner.run(job)

    def close(self) -> None:
        self.runner.close()


@dataclass
class Failure:
    """What a job raised: the message of a UserError, or the traceback of something else."""

    message: str | None = None
    traceback: str | None = None


@dataclass(eq=False)
class Worker:
    process: multiprocessing.Process
    pipe: connection.Connection
    job: Job | None = None  # the one it is at, or the last one

    @property
    def task(self) -> str | None:
        return self.job.task if self.job else None


class Workers:
    """Runs jobs in several processes; `close()` stops them.

    Args:
        make_runner: a picklable function without arguments, called in each worker. What it returns has `run(job, is_stopped)`,
            the `task` that it is at, and `close()`. What that gives may depend on the job only.
        count: how many workers.
    """

    def __init__(self, make_runner: Callable, count: int):
        self.waiting: list[Job] = []
        self.idle: list[Worker] = []
        self.busy: list[Worker] = []
        function = make_runner.func if isinstance(make_runner, functools.partial) else make_runner
        start_server(function.__module__)
        context = multiprocessing.get_context(START)
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, make_runner, number == 0), daemon=True)
            process.start()
            theirs.close()
            self.idle.append(Worker(process, ours))

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    def next(self) -> tuple:
        """(job, what its run returned) of the job that is done next, whichever that is.

        Raises:
            UserError: a worker raised it, or was killed.
        """
        while self.idle and self.waiting:
            wanted = {job.task for job in self.waiting}
            worker = next((worker for worker in self.idle if worker.task in wanted), self.idle[0])
            self.idle.remove(worker)
            at = Counter(other.task for other in self.busy)
            worker.job = self.waiting.pop(_choose(self.waiting, worker.task, at))
            self.busy.append(worker)
            with contextlib.suppress(BrokenPipeError):  # it has died, and the read below reports why
                worker.pipe.send(worker.job)
        ready = connection.wait([worker.pipe for worker in self.busy])
        worker = next(worker for worker in self.busy if worker.pipe is ready[0])
        try:
            result = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            raise UserError(
                f"a worker process ended with exit code {worker.process.exitcode} in the episode of seed {worker.job.seed}: "
                "-9 is what the system does when memory runs out. Pass a smaller --num_workers"
            ) from None
        if isinstance(result, Failure):
            if result.message is None:
                raise RuntimeError(f"a worker process failed:\n{result.traceback}")
            raise UserError(*result.message.split("\n"))
        self.busy.remove(worker)
        self.idle.append(worker)
        return worker.job, result

    def close(self) -> None:
        """End the workers: each stops at its next step."""
        workers = self.idle + self.busy
        for worker in workers:
            worker.pipe.close()
        for worker in workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()


def _choose(waiting: list[Job], task: str | None, at: Counter) -> int:
    """The position of the job for a worker that has a task open: another of that task, as opening one takes a second.

    Else one of the task with the fewest workers at it for the episodes that wait, of equals the first.
    """
    counts = Counter(job.task for job in waiting)
    if task not in counts:
        task = min(counts, key=lambda name: at[name] / counts[name])
    return next(position for position, job in enumerate(waiting) if job.task == task)


def _work(pipe: connection.Connection, make_runner: Callable, speaks: bool) -> None:
    """The life of a worker: it runs the jobs that come through the pipe until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's rendering on a CPU, which has threads of its own
    with contextlib.ExitStack() as stack:
        if not speaks:  # the warnings of one are those of all
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        runner = make_runner()
        stack.callback(runner.close)
        while True:
            try:
                job = pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            try:
                result = runner.run(job, pipe.poll)  # there is something to read once the other end is closed
            except UserError as error:
                result = Failure(message=str(error))
            except Exception:
                result = Failure(traceback=traceback.format_exc())
            try:
                pipe.send(result)
            except (BrokenPipeError, ConnectionResetError):
                return
