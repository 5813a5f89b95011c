from flowkv.cluster.usages import SILENT_S, Usages
from flowkv.messages import Usage
from flowkv.types import ProcessUsage

USAGE = ProcessUsage(resident_bytes=1, open_files=2, cpu_seconds=3.0)


def test_a_restarted_process_stands_in_the_line_of_the_one_before() -> None:
    usages = Usages()
    usages.hear(Usage("decode-0", USAGE), 1.0)
    usages.hear(Usage("decode-0~2", USAGE), 2.0)
    usages.hear(Usage("frontend", USAGE), 2.0)
    found = {place: usage.num_restarts for place, usage in usages.table(3.0).items()}
    assert found == {"decode-0": 2, "frontend": 0}


def test_who_is_silent_is_dropped() -> None:
    usages = Usages()
    usages.hear(Usage("decode-0", USAGE), 1.0)
    usages.hear(Usage("frontend", USAGE), SILENT_S)
    assert list(usages.table(SILENT_S + 1.5)) == ["frontend"]


def test_a_name_that_makes_no_sense_breaks_nothing() -> None:
    usages = Usages()
    usages.hear(Usage("decode-0~²", USAGE), 1.0)
    assert usages.table(1.0)["decode-0"].num_restarts == 0
