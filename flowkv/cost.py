"""Seconds of a step, learnt from steps that were measured."""

from dataclasses import dataclass

_FORGET = 0.9  # weight of the past beside one new sample
_DEFAULT_PREFILL_S_PER_TOKEN = 1e-4
_DEFAULT_DECODE_STEP_S = 0.02


@dataclass(slots=True)
class StepCost:
    """Running averages of one instance: seconds a prompt token, and seconds of a step that decodes.

    Before the first sample it holds guesses that are the same for every instance, so that placement goes by load.
    """

    prefill_s_per_token: float = _DEFAULT_PREFILL_S_PER_TOKEN
    decode_step_s: float = _DEFAULT_DECODE_STEP_S

    def learn(self, prefill_tokens: int, decode_choices: int, seconds: float) -> None:
        """One measured step. What a mixed step spent on its decodes is taken off before the rest goes to the prompt."""
        if prefill_tokens == 0:
            self.decode_step_s = _FORGET * self.decode_step_s + (1 - _FORGET) * seconds
            return
        on_prompt_s = max(0.0, seconds - self.decode_step_s) if decode_choices else seconds
        self.prefill_s_per_token = (
            _FORGET * self.prefill_s_per_token + (1 - _FORGET) * on_prompt_s / prefill_tokens
        )  # fmt: skip

    def prefill_s(self, num_tokens: int) -> float:
        return num_tokens * self.prefill_s_per_token
