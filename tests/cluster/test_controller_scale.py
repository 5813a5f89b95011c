"""Instances are added when there is too much to do, and retired when there is too little; newcomers and the dead."""

from flowkv.config import SchedulingConfig
from flowkv.messages import (
    Accepted,
    Drain,
    InstanceExited,
    Lost,
    PeerDown,
    Registered,
    Rejected,
    StartInstance,
    StopInstance,
)
from flowkv.types import Regime, Role
from tests.cluster.rig import LAUNCHER, Out, Rig, dispatches, of_type

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


class Scaled(Rig):
    """A cluster whose launcher does what it is told, and tells."""

    def __init__(self, *roles: Role, min_instances: int = 0, max_instances: int = 0, launcher: bool = True) -> None:
        scheduling = SchedulingConfig(
            min_instances=min_instances, max_instances=max_instances, interval_s=0.5, roles="fixed"
        )
        super().__init__(
            *roles, num_blocks=10_000, max_choices=64, scheduling=scheduling,
            launcher_address=LAUNCHER if launcher else None,
        )  # fmt: skip
        for name in self.names:
            self.teach(name, token_s=1e-3, choice_s=1e-4)

    def overload(self, looks: int) -> list[StartInstance]:
        """More prompts than all could ever compute."""
        return of_type(self.look_on(looks, waiting_tokens=100_000), StartInstance)

    def idle(self, looks: int) -> Out:
        return self.look_on(looks)

    def look_on(self, looks: int, waiting_tokens: int = 0) -> Out:
        out: Out = []
        for _ in range(looks):
            for name in self.names:
                out += self.report(name, waiting_tokens=waiting_tokens)
            out += self.tick(0.5)
        return out

    def exits(self, name: str) -> Out:
        if name in self.names:
            self.names.remove(name)
        return self.take(InstanceExited(name, "retired", "epoch"))

    def drained(self) -> str:
        """The one that is told to drain, at last."""
        for _ in range(200):
            for address, message in self.idle(1):
                if isinstance(message, Drain):
                    return address
        raise AssertionError("nobody is retired")


def test_overload_starts_instances_up_to_the_most_and_no_more() -> None:
    rig = Scaled(P, D, max_instances=4)
    assert rig.overload(2) == []  # a moment is not enough
    assert 1 <= len(rig.overload(200)) <= 2
    assert rig.controller.roster.regime is Regime.OVERLOADED
    assert rig.overload(200) == []  # those that were started may take as long as they need


def test_what_is_started_registers_and_gets_its_share() -> None:
    rig = Scaled(M, max_instances=2)
    [start] = rig.overload(50)
    assert start.role is M
    rig.register("mixed-1", M)
    assert rig.dispatch("r", num_tokens=500)[0] == "mixed-1"
    assert rig.overload(100) == []


def test_none_are_started_unless_that_is_allowed_and_somebody_can() -> None:
    assert Scaled(P, D).overload(100) == []
    assert Scaled(P, D, max_instances=2).overload(100) == []
    assert Scaled(P, D, max_instances=4, launcher=False).overload(100) == []


def test_one_that_could_not_start_may_be_started_again() -> None:
    rig = Scaled(M, max_instances=2)
    assert len(rig.overload(50)) == 1 and rig.overload(50) == []
    assert rig.exits("mixed-1") == []
    assert len(rig.overload(50)) == 1


def test_what_other_nodes_take_away_again_is_not_made_up_for() -> None:
    """While one of this node is started again nobody else is wanted."""
    rig = Scaled(M, M, max_instances=2)
    joined = "mixed-0@node-1"
    rig.register(joined, M)
    rig.controller.roster.retire(joined)
    assert (LAUNCHER, StopInstance(joined)) in rig.report(joined, is_drained=True)
    rig.exits(joined)
    rig.exits("mixed-1@node-1")  # which never came
    rig.exits("mixed-1")
    assert rig.overload(50) == []


def test_what_was_added_beside_other_nodes_is_not_taken_for_theirs_when_they_have_gone() -> None:
    rig = Scaled(M, max_instances=3)
    rig.register("mixed-0@node-1", M)
    assert len(rig.overload(50)) == 1
    rig.register("mixed-1", M)
    rig.exits("mixed-0@node-1")
    assert len(rig.overload(50)) == 1


def test_the_role_that_there_is_less_of_is_added() -> None:
    [start] = Scaled(P, D, D, max_instances=4).overload(50)
    assert start.role is P
    [start] = Scaled(P, P, D, max_instances=4).overload(50)
    assert start.role is D


def test_with_little_to_do_one_is_retired_when_it_has_said_that_nothing_is_left() -> None:
    rig = Scaled(M, M, min_instances=1)
    name = rig.drained()
    assert of_type(rig.idle(20), StopInstance) == []
    assert rig.report(name, is_drained=True) == [(LAUNCHER, StopInstance(name))]
    again = rig.report(name, is_drained=True) + rig.idle(20)
    assert of_type(again, StopInstance) == []  # once is enough
    out = rig.exits(name)
    assert (rig.names[0], PeerDown(name)) in out and not of_type(out, Rejected)
    assert [s.name for s in rig.status().instances] == rig.names


def test_never_fewer_than_the_least() -> None:
    rig = Scaled(M, M, M, min_instances=2)
    rig.exits(rig.drained())
    assert of_type(rig.idle(300), Drain) == []
    assert of_type(Scaled(M, M).idle(300), Drain) == []  # none are retired unless that is allowed


def test_one_after_the_other_and_never_the_last_of_a_role() -> None:
    rig = Scaled(P, P, D, D, min_instances=1)
    for _ in range(2):
        name = rig.drained()
        rig.report(name, is_drained=True)
        rig.exits(name)
    assert sorted(rig.roles[name] for name in rig.names) == [D, P]
    assert of_type(rig.idle(300), Drain) == []


def test_one_that_drains_gets_nothing_and_what_it_gives_back_is_run_elsewhere() -> None:
    rig = Scaled(M, M, min_instances=1)
    name = rig.drained()
    [other] = [n for n in rig.names if n != name]
    assert [s.name for s in rig.status().instances if s.is_draining] == [name]
    assert {rig.dispatch(f"r{i}", num_tokens=500)[0] for i in range(6)} == {other}


def test_it_is_not_stopped_while_something_is_on_its_way_to_it() -> None:
    rig = Scaled(M, M, min_instances=1)
    name, _ = rig.dispatch("r", num_tokens=20)
    rig.controller.roster.retire(name)
    assert of_type(rig.report(name, sequence=0, is_drained=True), StopInstance) == []
    [(again, _)] = dispatches(rig.report(name, returned=["r"], is_drained=True))
    assert again != name
    assert of_type(rig.report(name, is_drained=True), StopInstance) or rig.controller._views[name].is_stopping


def test_a_draining_instance_may_die_and_what_it_holds_is_lost() -> None:
    rig = Scaled(M, M, min_instances=1)
    held = {rig.dispatch(f"r{i}", num_tokens=20)[0]: f"r{i}" for i in range(2)}
    name = rig.drained()
    assert of_type(rig.exits(name), Lost) == [Lost(held[name], died=True)]


def test_with_nobody_left_to_take_it_what_was_given_back_waits() -> None:
    rig = Scaled(M, M, min_instances=1)
    name = rig.drained()
    [other] = [n for n in rig.names if n != name]
    address, _ = rig.dispatch("r", num_tokens=20)
    assert address == other
    rig.controller._views[other].is_draining = True
    rig.controller._fleet.refresh(rig.controller._views[other])
    assert of_type(rig.report(other, returned=["r"]), Lost) == [Lost("r")]
    assert rig.controller.num_assignments == 0


# --- newcomers -----------------------------------------------------------------------------------------------------


def test_a_newcomer_serves_once_the_last_link_of_either_direction_is_up() -> None:
    rig = Rig(P, D)
    rig.come("decode-9", D)
    assert of_type(rig.links_up("prefill-0", "decode-9"), Registered) == []
    assert of_type(rig.links_up("decode-9", "decode-1"), Registered) == []
    assert rig.dispatch("r")[1].decode_instances == ["decode-1"]
    assert of_type(rig.links_up("decode-9", "prefill-0"), Registered) == []
    assert ("decode-9", Registered()) in rig.links_up("decode-1", "decode-9")
    assert set(rig.dispatch("s")[1].decode_instances) == {"decode-1", "decode-9"}


def test_two_newcomers_are_both_admitted_whatever_comes_first() -> None:
    rig = Rig(M)
    rig.come("mixed-1", M)
    rig.come("mixed-2", M)
    rig.links_up("mixed-0", "mixed-1", "mixed-2")
    assert of_type(rig.links_up("mixed-1", "mixed-0"), Registered) == [Registered()]
    assert of_type(rig.links_up("mixed-2", "mixed-0"), Registered) == []  # the other is in service by now
    rig.links_up("mixed-1", "mixed-2")
    assert of_type(rig.links_up("mixed-2", "mixed-1"), Registered) == [Registered()]


def test_a_newcomer_does_not_wait_for_one_that_is_dead() -> None:
    rig = Rig(P, D)
    rig.come("decode-9", D)
    rig.links_up("prefill-0", "decode-9")
    rig.links_up("decode-9", "prefill-0")
    assert ("decode-9", Registered()) in rig.take(InstanceExited("decode-1", "was killed"))


def test_a_newcomer_that_dies_before_it_serves_is_forgotten() -> None:
    rig = Rig(P, D)
    rig.come("decode-9", D)
    rig.take(InstanceExited("decode-9", "was killed"))
    assert [s.name for s in rig.status().instances] == ["prefill-0", "decode-1"]
    assert rig.submit("r")[0] == ("f", Accepted("r"))
