"""A controller that was started again: what runs is found, what does not goes on, and nothing runs twice."""

from flowkv import __version__
from flowkv.cluster.controller import Controller
from flowkv.cluster.rebuild import Rebuild
from flowkv.messages import (
    Abort,
    Accepted,
    ClusterStatus,
    Dispatch,
    Drain,
    FrontendExited,
    FrontendHello,
    InstanceExited,
    Introduce,
    LoadReport,
    Lost,
    Message,
    PeerDown,
    PeerInfo,
    Register,
    Registered,
    RestartInstance,
    Submit,
)
from flowkv.types import InstanceCounters, InstanceLoad, LinkStatus, Request, Role, SamplingParams
from tests.cluster.rig import MODEL, Out
from tests.pools import descriptor


class Restarted:
    def __init__(self, *expected: str, has_nodes: bool = False) -> None:
        rebuild = Rebuild(expected, has_nodes=has_nodes)
        self.controller = Controller(
            1, "epoch", "local", name="controller~1", rebuild=rebuild, launcher_address="launcher"
        )
        self.now_s = 0.0
        self.controller.tick(self.now_s)
        self.take(FrontendHello("f", "f"))

    def take(self, message: Message) -> Out:
        self.controller.handle(message, self.now_s)
        return self._taken()

    def wait(self, seconds: float) -> Out:
        for _ in range(round(seconds / 0.5)):
            self.now_s += 0.5
            self.controller.tick(self.now_s)
        return self._taken()

    def register(
        self, name: str, running: tuple[str, ...] = (), sending: tuple[str, ...] = (), is_draining: bool = False
    ) -> Out:
        peer = PeerInfo(name, name, descriptor(name, "L", 100))
        return self.take(
            Register(
                peer, Role.MIXED, MODEL, 16, 8, __version__, "epoch", sequence=7, running=list(running),
                sending=list(sending), is_draining=is_draining,
            )
        )  # fmt: skip

    def report(self, name: str, **kwargs: object) -> Out:
        load = InstanceLoad(free_blocks=100)
        return self.take(LoadReport(name, 7, Role.MIXED, load, InstanceCounters(), [], [], address=name, **kwargs))  # type: ignore[arg-type]

    def submit(
        self, request_id: str, *, is_claim: bool = False, resumes: str | None = None, controller: str = ""
    ) -> Out:
        request = Request(request_id=request_id, prompt_ids=range(20), sampling=SamplingParams(max_tokens=10))
        return self.take(Submit("f", request, {}, resumes, is_claim, controller))

    def is_ready(self) -> bool:
        self.controller.handle(FrontendHello("f", "f"), self.now_s)
        [status] = [m for _, m in self.controller.take_messages() if isinstance(m, ClusterStatus)]
        return status.ready

    def _taken(self) -> Out:
        return [out for out in self.controller.take_messages() if not isinstance(out[1], ClusterStatus)]


def test_a_stranger_that_reports_is_asked_who_it_is() -> None:
    rig = Restarted("a")
    assert rig.report("a") == [("a", Introduce())]
    rig.take(InstanceExited("a", "was killed"))
    assert rig.report("a") == []


def test_a_request_that_runs_is_the_controllers_again() -> None:
    rig = Restarted("a")
    rig.register("a", running=("r",))
    assert rig.submit("r", is_claim=True) == [("f", Accepted("r"))]
    assert rig.controller.num_assignments == 1
    out = rig.take(InstanceExited("a", "was killed"))
    assert ("f", Lost("r", died=True)) in out


def test_a_claim_that_comes_before_its_instance_waits_for_it() -> None:
    rig = Restarted("a", "b")
    assert rig.submit("r", is_claim=True) == []
    rig.register("a")
    assert rig.wait(1) == []
    rig.register("b", running=("r",))
    assert rig.wait(0.5) == [("f", Accepted("r"))]


def test_what_nobody_runs_is_lost_and_what_is_new_is_dispatched_once_all_are_back() -> None:
    rig = Restarted("a")
    rig.submit("gone", is_claim=True)
    rig.register("a")
    assert ("f", Lost("gone")) in rig.wait(0.5)
    assert rig.submit("late", controller="controller") == []  # its frontend will claim it
    out = rig.submit("new", controller="controller~1")
    [dispatch] = [message for _, message in out if isinstance(message, Dispatch)]
    assert (dispatch.request.request_id, dispatch.sequence) == ("new", 8)
    assert ("f", Lost("gone")) in rig.wait(0.5)  # until the frontend answers
    rig.submit("gone~1", resumes="gone")
    assert not any(isinstance(message, Lost) for _, message in rig.wait(2))


def test_one_that_stays_silent_is_not_waited_for() -> None:
    rig = Restarted("a", "b")
    rig.register("a")
    assert rig.submit("r", is_claim=True) == []
    assert ("f", Lost("r")) in rig.wait(6)


def test_an_instance_that_died_meanwhile_is_not_waited_for_and_its_peers_hear_of_it() -> None:
    rig = Restarted("a", "b")
    rig.take(InstanceExited("b", "was killed"))
    rig.submit("r", is_claim=True)
    assert ("a", PeerDown("b")) in rig.register("a")
    assert ("f", Lost("r")) in rig.wait(0.5)


def test_the_peer_that_has_taken_it_over_holds_it() -> None:
    for order in (("a", "b"), ("b", "a")):
        rig = Restarted("a", "b")
        for name in order:
            rig.register(name, running=("r",) if name == "b" else (), sending=("r",) if name == "a" else ())
        assert rig.submit("r", is_claim=True) == [("f", Accepted("r"))]
        rig.take(InstanceExited("a", "was killed"))
        assert rig.controller.num_assignments == 1
        assert ("f", Lost("r", died=True)) in rig.take(InstanceExited("b", "was killed"))


def test_a_handover_or_an_end_before_the_claim_counts() -> None:
    rig = Restarted("a", "b")
    rig.register("a", running=("moved", "ended"))
    rig.register("b")
    rig.report("a", handed_over=[("moved", "b")])
    rig.take(LoadReport("a", 7, Role.MIXED, InstanceLoad(), InstanceCounters(), [], [("ended", 3)]))
    rig.submit("moved", is_claim=True)
    assert ("f", Lost("moved", died=True)) in rig.take(InstanceExited("b", "was killed"))
    rig.wait(0.5)
    assert ("f", Lost("ended")) in rig.submit("ended", is_claim=True)


def test_what_nobody_claims_is_aborted_in_the_end() -> None:
    rig = Restarted("a")
    rig.register("a", running=("orphan",))
    assert ("a", Abort("orphan")) in rig.wait(12)
    assert not any(isinstance(message, Abort) for _, message in rig.wait(12))


def test_an_abort_of_what_is_kept_is_heeded() -> None:
    rig = Restarted("a")
    rig.submit("r", is_claim=True)
    rig.take(Abort("r"))
    rig.register("a")
    assert not any(isinstance(message, Lost) for _, message in rig.wait(1))


def test_instances_of_other_nodes_get_time_to_come_back() -> None:
    rig = Restarted(has_nodes=True)
    rig.submit("r", is_claim=True)
    assert rig.wait(2) == []
    rig.register("far@node-1", running=("r",))
    assert ("f", Accepted("r")) in rig.wait(2)


def test_of_a_frontend_that_died_meanwhile_nothing_is_kept() -> None:
    rig = Restarted("a", "b")
    rig.submit("r", is_claim=True)
    rig.submit("new")
    rig.take(FrontendExited("f"))
    rig.register("a", running=("r",))
    rig.register("b")
    said = [message for _, message in rig.wait(15)]
    assert [message for message in said if not isinstance(message, Registered | RestartInstance)] == [Abort("r")]


def test_one_that_was_being_drained_gets_nothing_and_is_restarted() -> None:
    rig = Restarted("a", "b")
    rig.register("a", is_draining=True)
    rig.register("b")
    rig.report("a", links=[LinkStatus(peer="b", backend="local")])
    rig.report("b", links=[LinkStatus(peer="a", backend="local")])
    assert ("a", Drain()) in rig.wait(0.5)
    out = rig.submit("r", controller="controller~1")
    assert [to for to, message in out if isinstance(message, Dispatch)] == ["b"]
    rig.report("a", is_drained=True)
    assert ("launcher", RestartInstance("a")) in rig.wait(0.5)


def test_nobody_is_turned_away_while_instances_are_still_to_come_back() -> None:
    rig = Restarted("a")
    assert rig.is_ready()
    rig.wait(6)
    assert not rig.is_ready()
    rig.register("a")
    assert rig.is_ready()


def test_aborts_reach_the_one_that_has_taken_it_over() -> None:
    rig = Restarted("a", "b")
    rig.register("a", running=("r",))
    rig.register("b")
    rig.submit("r", is_claim=True)
    rig.report("a", handed_over=[("r", "b")])
    assert {address for address, _ in rig.take(Abort("r"))} == {"a", "b"}


def test_one_that_was_draining_gets_nothing_before_its_turn_either() -> None:
    rig = Restarted("a", "b")
    rig.register("b", is_draining=True)
    rig.register("a")
    for name, peer in (("a", "b"), ("b", "a")):
        rig.report(name, links=[LinkStatus(peer=peer, backend="local")])
    rig.wait(0.5)
    for i in range(4):
        [(address, _)] = [out for out in rig.submit(f"r{i}") if isinstance(out[1], Dispatch)]
        assert address == "a"
