"""How long an answer will be, from those that have ended."""

_NUM_BUCKETS = 32
_LEARN = 0.05  # weight of a new answer, once there are some
_COLD_TOKENS = 256.0  # a guess while none has ended
_MIN_SAMPLES = 3  # of prompts of about the same length, before they are trusted alone


class OutputLengths:
    """Running means: of all requests, and of those whose prompts lie between the same two powers of two."""

    def __init__(self) -> None:
        self._all = _Mean()
        self._buckets = [_Mean() for _ in range(_NUM_BUCKETS)]

    def learn(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._all.add(num_output_tokens)
        self._bucket(num_prompt_tokens).add(num_output_tokens)

    def predict(self, num_prompt_tokens: int, max_tokens: int) -> float:
        """Output tokens of one choice, `max_tokens` at most."""
        bucket = self._bucket(num_prompt_tokens)
        mean = bucket if bucket.num_samples >= _MIN_SAMPLES else self._all
        return min(float(max_tokens), mean.value if mean.num_samples else _COLD_TOKENS)

    def _bucket(self, num_prompt_tokens: int) -> "_Mean":
        return self._buckets[min(num_prompt_tokens.bit_length(), _NUM_BUCKETS - 1)]


class _Mean:
    __slots__ = ("num_samples", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.num_samples = 0

    def add(self, value: float) -> None:
        self.num_samples += 1
        self.value += max(_LEARN, 1.0 / self.num_samples) * (value - self.value)
