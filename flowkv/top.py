"""`flowkv top`: the instances of a cluster, and what they do at the moment, as a table that follows them."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flowkv.remote import Remote
from flowkv.restart import describe
from flowkv.server.records.cluster_view import ClusterView
from flowkv.server.records.rates import Rates
from flowkv.types import InstanceStatus, Regime

_STALE_S = 3.0  # the controller speaks four times a second
_FULL_WIDTH = 100  # a narrower terminal gets fewer columns
_REGIME_STYLES = {Regime.NORMAL: "green", Regime.UNDERLOADED: "cyan", Regime.IMBALANCED: "yellow"}


_COLUMNS: dict[str, Callable[[InstanceStatus, Rates | None], str]] = {
    "flips": lambda status, _: f"{status.num_flips}",
    "wait": lambda status, _: f"{status.load.num_waiting}",
    "pre-\nfill": lambda status, _: f"{status.load.num_prefilling}",
    "de-\ncode": lambda status, _: f"{status.load.num_decoding}",
    "send": lambda status, _: f"{status.load.num_sending}",
    "re-\nceive": lambda status, _: f"{status.load.num_receiving}",
    "pre-\nempt": lambda status, _: f"{status.load.num_preempted}",
    "waiting\ntokens": lambda status, _: f"{status.load.waiting_tokens:,}",
    "KV\nused": lambda status, _: f"{100 * status.load.used_blocks / status.num_blocks:.0f}%",
    "prefill\ntok/s": lambda _, rates: "-" if rates is None else f"{rates.prefill_tokens_per_s:,.0f}",
    "decode\ntok/s": lambda _, rates: "-" if rates is None else f"{rates.decode_tokens_per_s:,.0f}",
    "step\nms": lambda _, rates: "-" if rates is None or rates.step_s is None else f"{1000 * rates.step_s:.1f}",
    "sent\nMB/s": lambda _, rates: "-" if rates is None else f"{rates.moved_bytes_per_s / 1e6:,.1f}",
}
_WIDE_ONLY = {"flips", "re-\nceive", "pre-\nempt"}


def top(url: str, interval_s: float, once: bool) -> None:
    """Show the cluster at `url` every `interval_s` until Ctrl-C, or once. ConfigError if it does not answer.

    Rates are over one interval: what is shown once is shown after one.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, _FULL_WIDTH))
    tables = _tables(Remote(url), interval_s, console.width)
    with contextlib.suppress(KeyboardInterrupt):
        if once:
            console.print(next(itertools.islice(tables, 1, None)))
        elif not console.is_terminal:
            for table in tables:
                console.print(table)
        else:
            with Live(console=console, auto_refresh=False) as live:
                for table in tables:
                    live.update(table, refresh=True)


def _tables(remote: Remote, interval_s: float, width: int) -> Iterator[Group]:
    before = view = remote.view()
    while True:
        yield render(before, view, width)
        time.sleep(interval_s)
        later = remote.view()
        if later.time_s > view.time_s:
            before = view
        view = later


def render(before: ClusterView, after: ClusterView, width: int = _FULL_WIDTH) -> Group:
    """`after`, with rates since `before`; without, where they are one and the same."""
    elapsed_s = after.time_s - before.time_s
    old = {status.name: status for status in before.instances} if elapsed_s > 0 else {}
    columns = {title: cell for title, cell in _COLUMNS.items() if width >= _FULL_WIDTH or title not in _WIDE_ONLY}
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for title in ("instance", "role"):
        table.add_column(title, no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for status in after.instances:
        rates = Rates.between(old[status.name], status, elapsed_s) if status.name in old else None
        table.add_row(status.name, _role(status), *(cell(status, rates) for cell in columns.values()))
    return Group(_headline(after), table)


def _headline(view: ClusterView) -> Text:
    text = Text.assemble(
        (view.model_name or "no model yet", "bold"),
        f"  {_count(len(view.instances), 'instance')}  regime ",
        (view.regime, _REGIME_STYLES.get(view.regime, "red")),
        f"  {_count(view.num_flips, 'flip')}  {_count(view.num_refused, 'request')} refused",
    )
    if not view.is_ready:
        text.append("  not ready", "red")
    if view.rolling.instance:
        text.append(f"  restarting {describe(view.rolling)}", "yellow")
    elif view.rolling.failure:
        text.append(f"  restart given up: {view.rolling.failure}", "red")
    if view.age_s > _STALE_S:
        text.append(f"  nothing heard of the controller for {view.age_s:.0f} s", "red")
    return text


def _role(status: InstanceStatus) -> Text:
    if status.is_stalled:
        return Text(f"{status.role}, stalled", "red")
    return Text(f"{status.role}, draining", "yellow") if status.is_draining else Text(status.role)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
