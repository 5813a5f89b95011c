"""What the requests of the last seconds ask of the cluster."""

import math

_WINDOW_S = 8.0  # how far back rates look


class _Rate:
    """A sum that is forgotten over the window: so much a second."""

    __slots__ = ("_at_s", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._at_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        self._sum = self.per_s(now_s) * _WINDOW_S + amount
        self._at_s = now_s

    def per_s(self, now_s: float) -> float:
        return self._sum * math.exp((self._at_s - now_s) / _WINDOW_S) / _WINDOW_S


class Demand:
    """Rates of arrival, as predicted when each request came."""

    def __init__(self) -> None:
        self._prompt_tokens = _Rate()
        self._output_tokens = _Rate()
        self._requests = _Rate()
        self._held = _Rate()

    def add(self, num_prompt_tokens: int, num_output_tokens: float, now_s: float) -> None:
        """A request came; the output is that of all its choices."""
        self._requests.add(1.0, now_s)
        self._prompt_tokens.add(num_prompt_tokens, now_s)
        self._output_tokens.add(num_output_tokens, now_s)
        self._held.add(num_prompt_tokens + num_output_tokens / 2, now_s)

    def prompt_tokens_per_s(self, now_s: float) -> float:
        return self._prompt_tokens.per_s(now_s)

    def output_tokens_per_s(self, now_s: float) -> float:
        return self._output_tokens.per_s(now_s)

    def mean_prompt_tokens(self, now_s: float) -> float:
        return self._mean(self._prompt_tokens, now_s)

    def mean_held_tokens(self, now_s: float) -> float:
        """KV slots of a request halfway through its output."""
        return self._mean(self._held, now_s)

    def _mean(self, amounts: _Rate, now_s: float) -> float:
        requests_per_s = self._requests.per_s(now_s)
        return amounts.per_s(now_s) / requests_per_s if requests_per_s > 0 else 0.0
