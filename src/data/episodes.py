"""Episodes by their own index: parse a choice of them, and list them in messages."""

import re
from collections.abc import Iterable

from errors import UserError

LONGEST_LIST = 60  # characters of ranges in a message


def ranges(episodes: Iterable[int]) -> str:
    """Ascending ranges in the form of --episodes: `1:3,4` for 1, 2 and 4. Empty for no episodes."""
    spans: list[list[int]] = []  # [first, end] of each run of neighbours
    for episode in sorted(set(episodes)):
        if spans and spans[-1][1] == episode:
            spans[-1][1] = episode + 1
        else:
            spans.append([episode, episode + 1])
    return ",".join(f"{first}:{end}" if end > first + 1 else f"{first}" for first, end in spans)


def counted(episodes: Iterable[int]) -> str:
    """Episodes for a message: `episode 4`, or `12 episodes, 3:10,14:19`, shortened if there are many ranges."""
    episodes = set(episodes)
    text = ranges(episodes)
    if not episodes:
        return "no episodes"
    if len(episodes) == 1:
        return f"episode {text}"
    if len(text) > LONGEST_LIST:
        text = text[:LONGEST_LIST].rpartition(",")[0] + ",..."
    return f"{len(episodes)} episodes, {text}"


def parse_episodes(text: str | None, known: Iterable[int], flag: str = "--episodes") -> list[int]:
    """Episode indices of "0:40,45" (ends exclusive, as in Python), ascending and once each.

    Args:
        text: what to choose; None for all.
        known: indices of the dataset's episodes, which may have gaps. A range picks those that exist within it.
        flag: the flag that `text` comes from.

    Raises:
        UserError: not of that form, or not within the dataset.
    """
    known = set(known)
    if text is None:
        return sorted(known)
    chosen = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part)
        if match is None:
            raise UserError(f'{flag} {text}: expected numbers or ranges such as "0:40,45", got {part!r}')
        first = int(match[1])
        end = first + 1 if match[2] is None else int(match[2])
        found = {episode for episode in known if first <= episode < end}
        if not found or end > max(known) + 1:
            raise UserError(f"{flag} {text}: {part.strip()} is out of range, the dataset has {counted(known)}")
        chosen |= found
    return sorted(chosen)
