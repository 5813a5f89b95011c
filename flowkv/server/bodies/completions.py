"""The body of `POST /v1/completions`."""

from typing import ClassVar

import msgspec

from flowkv.errors import RequestError
from flowkv.server.bodies.generation import GenerationBody, NumLogprobs, Positive, decode_checked


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    prompt_field: ClassVar[str] = "prompt"
    unsupported: ClassVar[tuple[str, ...]] = (*GenerationBody.unsupported, "suffix", "prompt_logprobs")

    prompt: str | list[str | int | list[int]]
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Positive | None = None
    suffix: str | None = None
    prompt_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    def prompts(self) -> list[str | list[int]]:
        """One or more, each text or token ids. Raises `RequestError` where it is neither, or empty."""
        parts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        ids = [part for part in parts if isinstance(part, int)]
        prompts: list[str | list[int]] = [part for part in parts if not isinstance(part, int)]
        if ids and prompts:
            raise RequestError("prompt mixes token ids with whole prompts", param="prompt")
        if ids:
            return [ids]
        if not prompts or any(not prompt for prompt in prompts):
            raise RequestError("prompt is empty: it needs at least one token", param="prompt", code="empty_prompt")
        return prompts

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != self.num_choices:
            raise RequestError("best_of other than n is not supported", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens of 0 needs echo to be true", param="max_tokens")
        if self.echo and self.stream and self.logprobs is not None and self.num_choices > 1:
            raise RequestError("echo with logprobs can only be streamed for n of 1", param="echo")


_decoder = msgspec.json.Decoder(CompletionBody)


def decode_completion(data: bytes) -> CompletionBody:
    """Raises `RequestError` (400) naming the field."""
    return decode_checked(_decoder, data)
