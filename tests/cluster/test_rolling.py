"""Restarts and flips that operators ask for, and the end of what hangs; the launcher is played by the test."""

from flowkv.cluster.liveness import STALL_S
from flowkv.cluster.rolling import SUCCESSOR_TIMEOUT_S
from flowkv.config import RestartConfig, ServerConfig
from flowkv.messages import (
    Drain,
    FlipInstance,
    InstanceExited,
    Message,
    RestartInstance,
    RestartInstances,
    SetRole,
    StopInstance,
)
from flowkv.types import Role, RollingRestart
from tests.cluster.rig import LAUNCHER, Out, Rig, of_type

DRAIN_TIMEOUT_S = ServerConfig().drain_timeout_s
P, D = "prefill-0", "decode-1"


def make(*roles: Role) -> Rig:
    return Rig(*(roles or (Role.PREFILL, Role.DECODE)), launcher_address=LAUNCHER)


def ask(rig: Rig, *names: str) -> Out:
    rig.take(RestartInstances(list(names), "token"))
    return rig.tick()


def replaced(rig: Rig, name: str) -> Out:
    """As the launcher does it: the instance ends, and its successor registers."""
    out = rig.take(InstanceExited(name, "was drained"))
    rig.names.remove(name)
    return out + rig.register(f"{name}~1", rig.roles[name])


def wait(rig: Rig, seconds: float) -> Out:
    """All instances are heard meanwhile."""
    out: Out = []
    for _ in range(round(seconds)):
        for name in rig.names:
            rig.controller.handle(rig.finished(name), rig.now_s)
        out += rig.tick(1.0)
    return out


def rolling(rig: Rig) -> RollingRestart:
    return rig.status().rolling


def test_one_after_another_is_drained_restarted_and_waited_for() -> None:
    rig = make()
    assert ask(rig, P, D) == [(P, Drain())]
    assert rolling(rig) == RollingRestart("token", P, "draining", 0, 1)
    assert rig.tick() == []
    rig.report(P, is_drained=True)
    assert rig.tick() == [(LAUNCHER, RestartInstance(P))]
    assert rolling(rig) == RollingRestart("token", P, "starting", 0, 1)
    assert of_type(rig.tick(), Drain) == []
    replaced(rig, P)
    rig.tick()
    assert rig.tick() == [(D, Drain())]
    rig.report(D, is_drained=True)
    assert rig.tick() == [(LAUNCHER, RestartInstance(D))]
    replaced(rig, D)
    rig.tick()
    assert rolling(rig) == RollingRestart("token", "", "", 2, 0)
    assert rig.dispatch("r")[0] == f"{P}~1"


def test_meanwhile_others_get_the_requests() -> None:
    rig = make()
    ask(rig, P)
    to, dispatch = rig.dispatch("r")
    assert (to, dispatch.decode_instances) == (D, [])


def test_what_is_on_its_way_to_it_is_waited_for() -> None:
    rig = make()
    rig.dispatch("r")
    ask(rig, P)
    rig.report(P, sequence=0, is_drained=True)
    assert rig.tick() == [], "the dispatch has not come yet"
    rig.report(P, is_drained=True)
    assert rig.tick() == [(LAUNCHER, RestartInstance(P))]


def test_one_that_takes_too_long_is_restarted_anyway() -> None:
    rig = make()
    rig.dispatch("r")
    ask(rig, P)
    assert of_type(wait(rig, DRAIN_TIMEOUT_S - 2), RestartInstance) == []
    assert of_type(wait(rig, 2), RestartInstance) == [RestartInstance(P)]


def test_where_no_successor_comes_the_next_one_is_left_alone() -> None:
    rig = make()
    ask(rig, P, D)
    rig.take(InstanceExited(P, "killed"))
    rig.names.remove(P)
    assert of_type(wait(rig, SUCCESSOR_TIMEOUT_S + 2), Drain) == []
    assert rolling(rig) == RollingRestart("token", "", "", 0, 0, "no successor of prefill-0 is in service")
    assert ask(rig, D) == [(D, Drain())]
    assert rolling(rig).failure == ""


def test_who_has_ended_or_is_asked_for_twice_is_no_turn_of_its_own() -> None:
    rig = make()
    assert ask(rig, "prefill-9", P, P) == [(P, Drain())]
    ask(rig, P)
    assert rolling(rig).num_left == 0


def test_an_instance_that_is_to_be_restarted_is_not_retired() -> None:
    rig = make()
    ask(rig, P)
    out: list[Message] = [message for _, message in rig.report(P, is_drained=True) + rig.tick()]
    assert out == [RestartInstance(P)]


def test_of_a_node_that_wants_to_leave_they_are_drained_and_ended() -> None:
    rig = make()
    rig.controller.roster.retire(D)
    rig.controller.roster.retire(D)
    assert rig.controller.take_messages() == [(D, Drain())]
    assert of_type(rig.report(D, is_drained=True), StopInstance) == [StopInstance(D)]


def test_a_flip_by_hand() -> None:
    rig = make()
    assert rig.take(FlipInstance(D, Role.MIXED)) == [(D, SetRole(Role.MIXED))]
    assert rig.take(FlipInstance("decode-9", Role.MIXED)) == []


def test_one_that_stays_stalled_is_killed() -> None:
    rig = make()
    silence = int(2 * STALL_S)
    assert of_type(rig.wait(silence - 1, D), RestartInstance) == []
    assert of_type(rig.wait(1, D), RestartInstance) == [RestartInstance(P, hangs=True)]


def test_and_left_alone_where_that_is_asked_for() -> None:
    rig = Rig(Role.PREFILL, launcher_address=LAUNCHER, restart=RestartConfig(hung=False))
    assert of_type(rig.wait(30), RestartInstance) == []
