import msgspec
from rich.console import Console

from flowkv.server.records.cluster_view import ClusterView
from flowkv.top import render
from flowkv.types import InstanceCounters, InstanceLoad, InstanceStatus, Regime, Role, RollingRestart


def status(name: str, role: Role = Role.DECODE, **counters: float) -> InstanceStatus:
    load = InstanceLoad(num_waiting=1, num_prefilling=2, num_decoding=3, num_sending=4, num_receiving=5,
                        num_preempted=6, waiting_tokens=12345, used_blocks=16)  # fmt: skip
    totals = InstanceCounters(**counters)  # type: ignore[arg-type]
    return InstanceStatus(name=name, role=role, num_blocks=64, block_size=16, load=load, counters=totals)


def lines(before: ClusterView, after: ClusterView, width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(before, after, width))
    return capture.get().splitlines()


def row(shown: list[str], name: str) -> list[str]:
    [found] = [line.split() for line in shown if line.startswith(f"{name} ")]
    return found


def test_loads_are_those_of_now_and_rates_those_between_two_views() -> None:
    old = status("d0", num_steps=10, prefill_tokens=100, decode_tokens=50, step_seconds=1.0, transfer_bytes=10**6)
    new = status("d0", num_steps=30, prefill_tokens=500, decode_tokens=60, step_seconds=1.5, transfer_bytes=9 * 10**6)
    before = ClusterView(time_s=100.0, instances=[old])
    after = ClusterView(time_s=102.0, instances=[new, status("d1", num_steps=5)], model_name="m", is_ready=True)
    shown = lines(before, after)
    queues = ["0", "1", "2", "3", "4", "5", "6", "12,345", "25%"]
    assert row(shown, "d0") == ["d0", "decode", *queues, "200", "5", "25.0", "4.0"]
    assert row(shown, "d1") == ["d1", "decode", *queues, "-", "-", "-", "-"]  # nothing to compare it with yet
    assert row(lines(before, before), "d0")[-4:] == ["-"] * 4


def test_an_instance_that_makes_no_step_has_no_step_time() -> None:
    before, after = (ClusterView(time_s=time_s, instances=[status("d0", num_steps=3)]) for time_s in (1.0, 2.0))
    assert row(lines(before, after), "d0")[-4:] == ["0", "0", "-", "0.0"]


def test_what_is_wrong_or_changes_is_said() -> None:
    instances = [
        msgspec.structs.replace(status("p0", Role.PREFILL), is_stalled=True),
        msgspec.structs.replace(status("d0"), is_draining=True, num_flips=7),
    ]
    view = ClusterView(time_s=1.0, age_s=9.0, instances=instances, regime=Regime.OVERLOADED, num_flips=7, num_refused=1)
    shown = lines(view, view)
    head = " ".join(" ".join(shown[:2]).split())
    for words in ("overloaded", "7 flips", "1 request refused", "not ready", "no model yet"):
        assert words in head
    assert "nothing heard of the controller for 9 s" in head
    assert row(shown, "p0")[1:3] == ["prefill,", "stalled"]
    assert row(shown, "d0")[1:4] == ["decode,", "draining", "7"]


def test_a_narrow_terminal_gets_fewer_columns_and_no_broken_ones() -> None:
    view = ClusterView(time_s=1.0, instances=[status(f"prefill-{i}", Role.PREFILL) for i in range(3)])
    shown = lines(view, view, width=80)
    assert row(shown, "prefill-0")[1:8] == ["prefill", "1", "2", "3", "4", "12,345", "25%"]
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in shown)


def test_a_rolling_restart_is_shown_and_so_is_its_failure() -> None:
    rolling = RollingRestart("token", "decode-1", "draining", 1, 2)
    view = ClusterView(time_s=0.0, is_ready=True, rolling=rolling)
    [headline, *_] = lines(view, view, width=160)
    assert "restarting decode-1: draining (1 done, 2 left after it)" in headline
    failed = RollingRestart("token", failure="no successor of decode-1 is in service")
    view = ClusterView(time_s=0.0, is_ready=True, rolling=failed)
    [headline, *_] = lines(view, view, width=160)
    assert "restart given up: no successor of decode-1 is in service" in headline
