"""What is said of strangers: each kind of thing at once, and then with a count every while. A log is no place that
whoever likes to may flood."""

_INTERVAL_S = 10.0


class Throttle:
    """By kind; kinds are few."""

    def __init__(self, interval_s: float = _INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._said_s: dict[str, float] = {}
        self._num_unsaid: dict[str, int] = {}

    def note(self, kind: str, now_s: float) -> str | None:
        """If this one is to be said: what is to be said of those before it, or nothing. Else None."""
        if now_s - self._said_s.get(kind, float("-inf")) < self._interval_s:
            self._num_unsaid[kind] = self._num_unsaid.get(kind, 0) + 1
            return None
        self._said_s[kind] = now_s
        num_unsaid = self._num_unsaid.pop(kind, 0)
        return f" (and {num_unsaid} more since the last line like this)" if num_unsaid else ""
