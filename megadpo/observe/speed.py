"""How fast, and how much longer."""

from __future__ import annotations

from collections import deque


class TimeLeft:
    """Seconds to the end, from the pace of the last marks; slow first ones leave the window by themselves."""

    def __init__(self, total: float, window: int = 20) -> None:
        self._total = total
        self._marks: deque[tuple[float, float]] = deque(maxlen=window + 1)

    def mark(self, done: float, now: float) -> None:
        """`done` units of the total are done at `now` (seconds, any clock that only goes forward)."""
        self._marks.append((done, now))

    def seconds(self) -> float | None:
        """None until two marks say something."""
        if len(self._marks) < 2:
            return None
        (done_before, then), (done, now) = self._marks[0], self._marks[-1]
        if done <= done_before:
            return None
        return max(0.0, self._total - done) * (now - then) / (done - done_before)


def clock(seconds: float) -> str:
    """4:12, 1:04:12 or 2d 03:10:00."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{left:02}"
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def short(number: float) -> str:
    """Three or four digits that fit in a progress line: 0.693, 12.4, 8,192, 12.3k, 1.2e-05, nan."""
    size = abs(number)
    if number != number or size == float("inf"):
        return str(number)
    if size >= 10_000:
        return f"{number / 1000:,.1f}k"
    if size >= 1000:
        return f"{number:,.0f}"
    if size != 0 and size < 0.001:
        return f"{number:.1e}"
    return f"{number:.3f}" if size < 10 else f"{number:.1f}"
