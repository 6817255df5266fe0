"""What is wrong with a dataset's table."""

import torch
from torch import Tensor


def check_values(source) -> None:
    """Lengths, finite values, tasks and clock of the table."""
    lengths = dict(zip(source.meta.episodes["episode_index"], source.meta.episodes["length"], strict=True))
    for episode, start, end in zip(source.episodes, source.starts.tolist(), source.ends.tolist(), strict=True):
        if lengths.get(episode) != end - start:
            source.problems.append(
                f"episode {episode} has {end - start} rows in its table, {lengths.get(episode)} by its metadata"
            )
    for key, values in source.columns.items():
        if isinstance(values, Tensor) and values.is_floating_point() and not torch.isfinite(values).all():
            rows = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero()[:, 0]
            episode = int(source.episode_of(rows[:1]))
            source.problems.append(
                f"{key} is not finite in {len(rows)} rows, first in episode {source.episodes[episode]} "
                f"frame {int(rows[0] - source.starts[episode])}: remove that episode or mend the value"
            )
    tasks = source.columns.get("task_index")
    if tasks is None:
        source.problems.append("info.json has no feature task_index")
    elif not 0 <= int(tasks.min()) <= int(tasks.max()) < len(source.tasks):
        source.problems.append(
            f"task_index is {int(tasks.min())} to {int(tasks.max())} in its table, its metadata has {len(source.tasks)} tasks"
        )
    check_clock(source)


def check_clock(source) -> None:
    """timestamp against frame_index / fps: another rate is a problem, jitter a warning (frames go by row, not by clock)."""
    times, fps = source.columns.get("timestamp"), source.meta.fps
    if times is None or source.rows < 2:
        return
    spans = list(zip(source.starts.tolist(), source.ends.tolist(), strict=True))
    paces = [float(times[end - 1] - times[start]) / (end - 1 - start) for start, end in spans if end - start > 1]
    pace = sorted(paces)[len(paces) // 2] if paces else 1 / fps  # seconds a frame, of the typical episode
    if not 0.75 < pace * fps < 1.25:
        source.problems.append(
            f"timestamps advance by {pace:.4g} s a frame, fps {fps} in info.json means {1 / fps:.4g} s: "
            "delta timestamps would not fit, mend fps or the timestamps"
        )
        return
    starts = source.starts[source.episode_of(torch.arange(source.rows))]
    drift = float((times - (torch.arange(source.rows) - starts) / fps).abs().max())
    if drift > 1e-3:
        source.warnings.append(
            f"timestamps are up to {drift:.2f} s off frame_index / fps: frames are taken by row, not by clock"
        )
