"""How a request's life is put together from what several processes measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowkv.errors import RequestError
from flowkv.server.records.timeline import FRONTEND, PhaseName, RequestRecord, State, Timeline, server_timing
from flowkv.types import FinishReason, Output, Request, SamplingParams, Timings

ARRIVAL_S = 500.0
ARRIVED_AT = 1.8e9


def make_timeline(n: int = 1, tokenize_s: float = 0.25) -> Timeline:
    request = Request(request_id="r", prompt_ids=[1] * 7, sampling=SamplingParams(max_tokens=9, n=n))
    return Timeline(request, ARRIVED_AT, ARRIVAL_S, ARRIVAL_S + tokenize_s)


def output(timings: Timings, finish_reason: FinishReason | None = None, choice: int = 0) -> tuple[Output, Timings]:
    return Output("r", choice, 0, [5], finish_reason, timings=timings), timings


def spans(record: RequestRecord) -> dict[str, tuple[str, float, float]]:
    return {phase.name: (phase.where, phase.start_s, phase.start_s + phase.seconds) for phase in record.phases}


def split_request() -> Timeline:
    """Prefilled on p from 1.0 to 2.0, decoded on d from 2.75 to 5.0; half a second is in no phase."""
    timeline = make_timeline()
    timeline.accepted(ARRIVAL_S + 0.5)
    timeline.heard("p", *output(Timings(queued_s=0.25, prefill_s=1.0)), ARRIVAL_S + 2.0)
    timeline.put_out(1, 0.125, ARRIVAL_S + 2.0)
    first = Timings(reserved_s=0.5, transfer_s=0.5, waiting_s=0.25, decode_s=0.25)
    timeline.heard("d", *output(first), ARRIVAL_S + 3.0)
    timeline.put_out(1, 0.125, ARRIVAL_S + 3.0)
    timeline.heard("d", *output(Timings(decode_s=2.25), FinishReason.STOP), ARRIVAL_S + 5.0)
    timeline.put_out(3, 0.25, ARRIVAL_S + 5.0)
    timeline.finished(FinishReason.STOP, ARRIVAL_S + 5.0)
    return timeline


def test_phases_are_laid_out_backwards_from_when_they_were_heard_of() -> None:
    record = split_request().record(ARRIVAL_S + 99.0)
    assert spans(record) == {
        PhaseName.TOKENIZE: (FRONTEND, 0.0, 0.25),
        PhaseName.PLACE: (FRONTEND, 0.25, 0.5),
        PhaseName.QUEUED: ("p", 0.75, 1.0),
        PhaseName.PREFILL: ("p", 1.0, 2.0),
        PhaseName.RESERVED: ("d", 1.5, 2.0),
        PhaseName.TRANSFER: ("d", 2.0, 2.5),
        PhaseName.WAITING: ("d", 2.5, 2.75),
        PhaseName.DECODE: ("d", 2.75, 5.0),
        PhaseName.DETOKENIZE: (FRONTEND, 4.5, 5.0),
    }
    assert record.unaccounted_s == 0.25  # between the controller's word and the queue of p


def test_a_record_says_what_became_of_the_request() -> None:
    record = split_request().record(ARRIVAL_S + 99.0)
    assert (record.state, record.finish_reason, record.status) == (State.FINISHED, FinishReason.STOP, 200)
    assert (record.prompt_tokens, record.output_tokens, record.num_attempts) == (7, 5, 1)
    assert (record.ttft_s, record.e2el_s, record.tpot_s) == (2.0, 5.0, 0.75)
    assert (record.prefill_instance, record.decode_instance) == ("p", "d")
    assert record.arrived_at == ARRIVED_AT


def test_a_request_that_runs_shows_what_is_known_of_it() -> None:
    timeline = make_timeline()
    assert timeline.record(ARRIVAL_S + 1.0).state is State.PLACING
    timeline.accepted(ARRIVAL_S + 0.5)
    record = timeline.record(ARRIVAL_S + 1.0)
    assert (record.state, record.elapsed_s, record.e2el_s, record.unaccounted_s) == (State.PREFILLING, 1.0, None, 0.5)
    timeline.heard("p", *output(Timings(prefill_s=0.5)), ARRIVAL_S + 2.0)
    timeline.put_out(1, 0.0, ARRIVAL_S + 2.0)
    timeline.heard("p", *output(Timings(decode_s=0.5)), ARRIVAL_S + 3.0)
    record = timeline.record(ARRIVAL_S + 4.0)
    assert record.state is State.DECODING
    assert spans(record)[PhaseName.DECODE] == ("p", 2.5, 4.0)


def test_a_stop_string_ends_the_decode_where_the_frontend_saw_it() -> None:
    timeline = make_timeline()
    timeline.heard("p", *output(Timings(prefill_s=0.5)), ARRIVAL_S + 1.0)
    timeline.heard("p", *output(Timings(decode_s=0.5)), ARRIVAL_S + 2.0)
    timeline.put_out(2, 0.0, ARRIVAL_S + 3.0)
    timeline.finished(FinishReason.STOP, ARRIVAL_S + 3.0)
    assert spans(timeline.record(ARRIVAL_S + 9.0))[PhaseName.DECODE] == ("p", 1.5, 3.0)


def test_the_decode_of_several_choices_lasts_as_long_as_the_longest() -> None:
    timeline = make_timeline(n=2)
    for choice in range(2):
        timeline.heard("p", *output(Timings(prefill_s=0.5), choice=choice), ARRIVAL_S + 1.0)
        timeline.heard("p", *output(Timings(decode_s=0.5), choice=choice), ARRIVAL_S + 1.5)
    timeline.heard("p", *output(Timings(decode_s=1.5), FinishReason.STOP, 1), ARRIVAL_S + 2.5)
    timeline.heard("p", *output(Timings(decode_s=1.0), FinishReason.STOP, 0), ARRIVAL_S + 3.0)  # late
    timeline.put_out(8, 0.0, ARRIVAL_S + 3.0)
    timeline.finished(FinishReason.STOP, ARRIVAL_S + 3.0)
    assert spans(timeline.record(ARRIVAL_S + 3.0))[PhaseName.DECODE] == ("p", 1.0, 2.5)


def test_attempts_follow_each_other() -> None:
    timeline = make_timeline()
    timeline.accepted(ARRIVAL_S + 0.5)
    timeline.heard("p", *output(Timings(prefill_s=0.5)), ARRIVAL_S + 1.0)
    timeline.heard("d", *output(Timings(waiting_s=0.25, decode_s=0.25)), ARRIVAL_S + 1.5)
    timeline.put_out(2, 0.0, ARRIVAL_S + 1.5)
    timeline.resubmitted(ARRIVAL_S + 3.0)
    timeline.heard("q", *output(Timings(prefill_s=0.5)), ARRIVAL_S + 4.0)
    timeline.heard("q", *output(Timings(decode_s=0.5), FinishReason.STOP), ARRIVAL_S + 4.5)
    timeline.finished(FinishReason.STOP, ARRIVAL_S + 4.5)
    record = timeline.record(ARRIVAL_S + 9.0)
    found = [(p.name, p.where, p.start_s, p.start_s + p.seconds) for p in record.phases if p.name is PhaseName.DECODE]
    assert found == [(PhaseName.DECODE, "d", 1.25, 3.0), (PhaseName.DECODE, "q", 4.0, 4.5)]
    assert [phase.attempt for phase in record.phases if phase.name is PhaseName.PREFILL] == [0, 1]
    assert (record.num_attempts, record.prefill_instance) == (2, "q")


@pytest.mark.parametrize(("was_accepted", "state"), [(False, State.REFUSED), (True, State.FAILED)])
def test_a_request_that_was_taken_fails_and_another_is_refused(was_accepted: bool, state: State) -> None:
    timeline = make_timeline()
    if was_accepted:
        timeline.accepted(ARRIVAL_S + 0.5)
    timeline.failed(RequestError("no", status=429, code="overloaded"), ARRIVAL_S + 1.0)
    record = timeline.record(ARRIVAL_S + 9.0)
    assert (record.state, record.status, record.error, record.e2el_s) == (state, 429, "overloaded", 1.0)


def test_one_whose_client_went_away() -> None:
    timeline = make_timeline()
    timeline.aborted(ARRIVAL_S + 1.0)
    record = timeline.record(ARRIVAL_S + 9.0)
    assert (record.state, record.finish_reason, record.status) == (State.ABORTED, FinishReason.ABORT, 499)


seconds = st.floats(0.0, 10.0)


@given(
    queued=st.builds(Timings, queued_s=seconds, prefill_s=seconds),
    decoded=st.builds(
        Timings, reserved_s=seconds, transfer_s=seconds, waiting_s=seconds, prefill_s=st.just(0.0), decode_s=seconds
    ),
    heard_s=st.tuples(seconds, seconds, seconds),
)
def test_no_phase_begins_before_the_request_and_gaps_are_never_negative(
    queued: Timings, decoded: Timings, heard_s: tuple[float, float, float]
) -> None:
    """However wrong the clock of an instance runs."""
    timeline = make_timeline()
    timeline.accepted(ARRIVAL_S + 0.5)
    at_s = ARRIVAL_S + 0.5
    for instance, timings, gap_s in (("p", queued, heard_s[0]), ("d", decoded, heard_s[1])):
        at_s += gap_s
        timeline.heard(instance, *output(timings), at_s)
        timeline.put_out(1, 0.0, at_s)
    timeline.finished(FinishReason.LENGTH, at_s + heard_s[2])
    record = timeline.record(at_s + heard_s[2])
    assert all(phase.start_s >= 0.0 and phase.seconds >= 0.0 for phase in record.phases)
    assert -1e-9 <= record.unaccounted_s <= record.elapsed_s


def test_server_timing_is_in_milliseconds_and_names_who_measured() -> None:
    value = server_timing([split_request().record(ARRIVAL_S + 9.0)])
    assert value.startswith('tokenize;dur=250.000;desc="frontend", place;dur=250.000;desc="frontend", queued;')
    assert value.endswith("unaccounted;dur=250.000, ttft;dur=2000.000, total;dur=5000.000")
