import pytest

from flowkv import __version__
from flowkv.cluster.controller import Controller
from flowkv.errors import ProtocolError
from flowkv.messages import (
    Abort,
    Accepted,
    ClusterStatus,
    Dispatch,
    FrontendHello,
    InstanceExited,
    LoadReport,
    Message,
    PeerDown,
    PeerInfo,
    PeerUp,
    Register,
    Registered,
    RegistrationRefused,
    Rejected,
    StepSample,
    Submit,
)
from flowkv.types import InstanceCounters, InstanceLoad, LinkStatus, ModelInfo, Request, Role, SamplingParams
from tests.pools import descriptor

MODEL = ModelInfo(name="m", dtype="float32", vocab_size=10, max_model_tokens=1000)


class Rig:
    """A controller and what it says, by address."""

    def __init__(self, *roles: Role, num_blocks: int = 100) -> None:
        self.controller = Controller(len(roles), "epoch", "local")
        self.num_blocks = num_blocks
        self.names: list[str] = []
        self.take(FrontendHello("f", "f"))
        for i, role in enumerate(roles):
            self.register(f"{role}-{i}", role)

    def register(self, name: str, role: Role, layout: str = "L", model: ModelInfo = MODEL) -> list[tuple[str, Message]]:
        """All of its answers, its links to and from all others included."""
        peer = PeerInfo(name, name, descriptor(name, layout, self.num_blocks))
        out = self.take(Register(peer, role, model, 16, 8, __version__, "epoch"))
        if any(isinstance(message, RegistrationRefused) for _, message in out):
            return out
        self.names.append(name)
        for sender in self.names:
            links = [LinkStatus(peer=other, backend="local") for other in self.names if other != sender]
            load = InstanceLoad(free_blocks=self.num_blocks)
            out += self.take(LoadReport(sender, 0, load, InstanceCounters(), [], [], [], links))
        return out

    def take(self, message: Message) -> list[tuple[str, Message]]:
        self.controller.handle(message, 0.0)
        return self.controller.take_messages()

    def submit(self, request_id: str, num_tokens: int = 20, max_tokens: int = 10) -> list[tuple[str, Message]]:
        sampling = SamplingParams(max_tokens=max_tokens)
        return self.take(Submit("f", Request(request_id=request_id, prompt_ids=[1] * num_tokens, sampling=sampling)))

    def dispatch(self, request_id: str, **kwargs: int) -> tuple[str, Dispatch]:
        for address, message in self.submit(request_id, **kwargs):
            if isinstance(message, Dispatch):
                return address, message
        raise AssertionError("nothing was dispatched")

    def report(self, name: str, sequence: int = 0, steps: list[StepSample] | None = None, **load: int) -> None:
        counters = InstanceCounters()
        self.take(
            LoadReport(name, sequence, InstanceLoad(free_blocks=self.num_blocks, **load), counters, steps or [], [])
        )


def finished(name: str, *request_ids: str, handed_over: list[tuple[str, str]] | None = None) -> LoadReport:
    """As from an instance whose links are what they were: a report without them would take it for one without."""
    return LoadReport(name, 0, InstanceLoad(), InstanceCounters(), [], list(request_ids), handed_over or [])


def test_ready_when_all_have_registered_and_everyone_knows_everyone() -> None:
    rig = Rig(Role.PREFILL)
    rig.controller._num_instances = 2
    out = rig.register("decode-1", Role.DECODE)
    assert ("prefill-0", PeerUp(PeerInfo("decode-1", "decode-1", descriptor("decode-1")))) in out
    assert ("decode-1", PeerUp(PeerInfo("prefill-0", "prefill-0", descriptor("prefill-0")))) in out
    assert ("decode-1", Registered()) in out
    status = out[-1][1]
    assert isinstance(status, ClusterStatus) and status.ready and status.max_request_tokens == 1000


def test_a_prompt_goes_to_a_prefill_instance_and_names_who_decodes_best_first() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.report("decode-1", num_decoding=5)
    address, dispatch = rig.dispatch("r")
    assert address == "prefill-0"
    assert dispatch.decode_instances == ["decode-2", "decode-1"]


def test_mixed_instances_decode_what_they_prefill() -> None:
    rig = Rig(Role.MIXED, Role.MIXED)
    assert rig.dispatch("r")[1].decode_instances == []


def test_what_was_sent_since_the_last_report_counts() -> None:
    rig = Rig(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    placements = [rig.dispatch(f"r{i}") for i in range(4)]
    assert [address for address, _ in placements] == ["prefill-0", "prefill-1"] * 2
    assert [dispatch.decode_instances[0] for _, dispatch in placements] == ["decode-2", "decode-3"] * 2
    rig.report("prefill-0", sequence=placements[2][1].sequence)
    assert rig.dispatch("r4")[0] == "prefill-0"  # its report has seen both; those of prefill-1 are still on their way


def test_blocks_of_requests_on_their_way_count_as_taken() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.report("decode-2", num_decoding=5)
    assert rig.dispatch("large", num_tokens=1500)[1].decode_instances[0] == "decode-1"
    assert rig.dispatch("next", num_tokens=500)[1].decode_instances[0] == "decode-2"


def test_the_faster_instance_gets_the_longer_queue() -> None:
    rig = Rig(Role.PREFILL, Role.PREFILL, Role.DECODE)
    for _ in range(50):
        rig.report("prefill-0", steps=[StepSample(100, 0, 100, 1.0)], waiting_tokens=100)
        rig.report("prefill-1", steps=[StepSample(100, 0, 100, 0.1)], waiting_tokens=300)
    assert rig.dispatch("r")[0] == "prefill-1"


def test_one_that_cannot_be_held_anywhere_is_refused_and_costs_nothing() -> None:
    rig = Rig(Role.MIXED, num_blocks=2)
    [(address, answer)] = rig.submit("r", num_tokens=30, max_tokens=3)
    assert address == "f" and isinstance(answer, Rejected)
    assert answer.status == 400 and "32 tokens" in answer.message
    assert rig.controller.num_assignments == 0


def test_more_choices_than_any_instance_decodes_at_once_are_refused() -> None:
    rig = Rig(Role.MIXED)
    request = Request(request_id="r", prompt_ids=[1], sampling=SamplingParams(max_tokens=1, n=9))
    [(_, answer)] = rig.take(Submit("f", request))
    assert isinstance(answer, Rejected) and answer.status == 400 and "8 choices" in answer.message


def test_before_anyone_is_there_the_answer_is_503() -> None:
    controller = Rig()
    [(_, answer)] = controller.submit("r")
    assert isinstance(answer, Rejected) and answer.status == 503


def test_a_repeated_submit_runs_nothing_twice_not_even_after_the_end() -> None:
    rig = Rig(Role.MIXED)
    rig.submit("r")
    assert rig.submit("r") == [("f", Accepted("r"))]
    rig.take(finished("mixed-0", "r"))
    assert rig.submit("r") == [("f", Accepted("r"))]
    assert rig.controller.num_assignments == 0


def test_an_abort_goes_to_all_who_may_hold_some_of_it() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.submit("r")
    assert {address for address, _ in rig.take(Abort("r"))} == {"prefill-0", "decode-1", "decode-2"}
    rig.take(finished("prefill-0", "r"))
    assert {address for address, _ in rig.take(Abort("r"))} == {"prefill-0", "decode-1", "decode-2"}


def test_the_death_of_the_owner_ends_the_request_and_is_told_to_all() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE, Role.DECODE)
    rig.submit("r")
    rig.take(finished("prefill-0", handed_over=[("r", "decode-1")]))
    out = rig.take(InstanceExited("decode-1", "was killed"))
    assert ("prefill-0", PeerDown("decode-1")) in out and ("decode-2", PeerDown("decode-1")) in out
    [failure] = [message for _, message in out if isinstance(message, Rejected)]
    assert failure.request_id == "r" and failure.status == 500 and "decode-1" in failure.message
    assert rig.controller.num_assignments == 0


def test_a_handoff_to_one_that_has_died_meanwhile_ends_the_request() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    rig.take(InstanceExited("decode-1", "was killed"))
    out = rig.take(finished("prefill-0", handed_over=[("r", "decode-1")]))
    assert any(isinstance(message, Rejected) for _, message in out)


def test_without_decode_instances_the_prefill_instance_decodes() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.take(InstanceExited("decode-1", "was killed"))
    address, dispatch = rig.dispatch("r")
    assert address == "prefill-0" and dispatch.decode_instances == []


def test_an_instance_of_another_layout_or_model_is_refused_at_registration() -> None:
    rig = Rig(Role.PREFILL)
    other = ModelInfo(name="other", dtype="float32", vocab_size=10, max_model_tokens=1000)
    for kwargs in ({"layout": "X"}, {"model": other}):
        out = rig.register("decode-1", Role.DECODE, **kwargs)
        assert [type(message) for _, message in out] == [RegistrationRefused]


def test_one_whose_end_was_told_before_it_registered_is_not_taken() -> None:
    rig = Rig(Role.MIXED)
    rig.take(InstanceExited("mixed-1", "was killed"))
    assert rig.register("mixed-1", Role.MIXED) == []
    assert rig.dispatch("r")[0] == "mixed-0"


def test_a_message_for_somebody_else_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="PeerDown"):
        Rig(Role.MIXED).take(PeerDown("x"))
