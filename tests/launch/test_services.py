import re

import pytest

from flowkv.config import RestartConfig
from flowkv.errors import ConfigError, FlowKVError
from flowkv.launch.children import NotStarted
from flowkv.launch.services import Services
from flowkv.launch.timers import Timers
from flowkv.messages import StartFailed


class Rig:
    """One service, whose processes the test plays."""

    def __init__(self, max_failures: int = 3) -> None:
        self.notes: list[str] = []
        self.started: list[tuple[str, int]] = []
        self.ended: list[str] = []
        self.timers = Timers()
        self.services = Services(self, self.timers)
        restart = RestartConfig(max_failures=max_failures)
        self.num_no_room = 0  # so many starts fail
        self.services.start("frontend", restart, self.start, self.ended.append)

    def start(self, name: str, generation: int) -> None:
        if self.num_no_room:
            self.num_no_room -= 1
            raise NotStarted("could not be started: no room")
        self.started.append((name, generation))

    def progress(self, process: str, fraction: float, text: str) -> None: ...

    def ready(self, text: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self, process: str, is_ready: bool = True) -> None:
        self.services.on_exit(process, is_ready, "was killed by SIGKILL")

    def pass_time(self) -> None:
        self.timers.run_due(float("inf"))


def test_one_that_ends_is_followed_by_another_of_another_name() -> None:
    rig = Rig()
    assert rig.services.present_name("frontend") == "frontend"
    rig.end("frontend")
    assert rig.ended == ["frontend"]
    assert not rig.services.is_running("frontend")
    rig.pass_time()
    assert rig.started == [("frontend", 0), ("frontend~1", 1)]
    assert rig.services.is_running("frontend") and rig.services.present_name("frontend") == "frontend~1"
    rig.end("frontend~1")
    assert rig.notes == [
        "the frontend was killed by SIGKILL; starting it again",
        "the frontend~1 was killed by SIGKILL; starting it again in 1 s (failure 2 of at most 3 without progress)",
    ]


def test_one_that_keeps_ending_without_progress_is_the_end_of_the_node() -> None:
    rig = Rig(max_failures=2)
    rig.end("frontend")
    rig.pass_time()
    with pytest.raises(FlowKVError, match=r"the frontend~1 was killed by SIGKILL: 2 times in a row without progress"):
        rig.end("frontend~1", is_ready=False)


def test_the_first_of_them_must_start() -> None:
    with pytest.raises(FlowKVError, match="the frontend was killed by SIGKILL before it was ready"):
        Rig().end("frontend", is_ready=False)
    with pytest.raises(ConfigError, match="frontend: the port is taken"):
        Rig().services.on_start_failed(StartFailed("frontend", "the port is taken"))


def test_why_a_successor_cannot_start_is_shown_and_it_is_tried_again() -> None:
    rig = Rig()
    rig.end("frontend")
    rig.pass_time()
    assert rig.services.on_start_failed(StartFailed("frontend~1", "the port is taken"))
    rig.end("frontend~1", is_ready=False)
    assert rig.notes[-1].startswith("the frontend~1 the port is taken; starting it again in 1 s")
    rig.pass_time()
    assert rig.started[-1] == ("frontend~2", 2)


def test_a_successor_that_the_machine_has_no_room_for_is_a_failure_and_is_tried_again() -> None:
    rig = Rig()
    rig.num_no_room = 1
    rig.end("frontend")
    rig.pass_time()
    assert re.search("frontend~1 could not be started: no room; starting it again in 1 s .failure 2 of", rig.notes[-1])
    assert not rig.services.is_running("frontend")
    rig.pass_time()
    assert rig.started[-1] == ("frontend~2", 2)


def test_the_first_of_them_must_find_room() -> None:
    rig = Rig()
    rig.num_no_room = 1
    with pytest.raises(FlowKVError, match="the controller could not be started: no room"):
        rig.services.start("controller", RestartConfig(), rig.start)


def test_one_that_was_ready_may_say_what_it_likes() -> None:
    rig = Rig()
    rig.services.on_ready("frontend", 0.0)
    assert rig.services.on_start_failed(StartFailed("frontend", "it broke"))
    rig.end("frontend")
    assert rig.notes == ["the frontend it broke; starting it again"]


def test_of_others_nothing_is_known() -> None:
    rig = Rig()
    assert not rig.services.on_start_failed(StartFailed("prefill-0", "why"))
    with pytest.raises(FlowKVError, match="the stranger was killed"):
        rig.end("stranger")


def hung_after(rig: Rig, beat_until_s: float, *looks_s: float) -> list[str]:
    """Who is to be killed at one of these looks, having beaten once a second up to some time."""
    rig.services.on_ready("frontend", 0.0)
    rig.services.on_beat("frontend")
    hung = []
    for now_s in looks_s:
        hung += rig.services.take_hung(now_s)
        if now_s <= beat_until_s:
            rig.services.on_beat("frontend")
    return hung


def test_one_that_says_nothing_for_long_hangs_which_is_a_failure_like_others() -> None:
    rig = Rig()
    assert hung_after(rig, 20.0, *range(30)) == []
    assert rig.services.take_hung(30.0) == ["frontend"]
    rig.end("frontend")
    assert rig.notes == ["the frontend said nothing for too long; starting it again"]
    rig.pass_time()
    assert [rig.services.take_hung(now_s) for now_s in range(31, 60)] == [[]] * 29  # not ready yet


def test_silence_counts_only_while_the_launcher_is_awake() -> None:
    assert hung_after(Rig(), 3.0, 0.0, 1.0, 2.0, 3.0, 1000.0, 1001.0) == []


def test_none_is_killed_that_never_beats_or_where_that_is_not_wanted() -> None:
    rig = Rig()
    rig.services.on_ready("frontend", 0.0)
    assert [rig.services.take_hung(now_s) for now_s in range(60)] == [[]] * 60
    rig = Rig()
    rig.services.start("controller", RestartConfig(hung=False), rig.start)
    rig.services.on_ready("controller", 0.0)
    rig.services.on_beat("controller")
    assert [rig.services.take_hung(now_s) for now_s in range(60)] == [[]] * 60
