"""Delta windows: which rows of the table each sample of a batch reads.

B samples, T deltas.
"""

from torch import Tensor


def window_rows(rows: Tensor, deltas: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that `rows + deltas` reach, clamped to each sample's episode, and which of them were clamped.

    Args:
        rows: (B,) int64 rows of the samples.
        deltas: (T,) int64 offsets in frames, negative for the past.
        starts: (B,) int64 first row of each sample's episode.
        ends: (B,) int64 row after its last.

    Returns:
        (B, T) int64 rows, and (B, T) bool, true where the window leaves the episode (LeRobot's `<key>_is_pad`).

    Source: LeRobot 0.6.1 `DatasetReader._get_query_indices`, one sample at a time there.
    """
    wanted = rows[:, None] + deltas[None, :]  # (B, T)
    first = starts[:, None]  # (B, 1)
    last = ends[:, None] - 1
    return wanted.clamp(first, last), (wanted < first) | (wanted > last)
