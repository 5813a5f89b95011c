from flowkv.engine.links import Links
from flowkv.transfer.base import Linked


def test_a_link_that_fails_is_left_alone_for_a_while_and_never_for_good() -> None:
    links = Links()
    links.up(Linked("d", "local"))
    links.failed("d")
    assert links.is_good("d")  # once may happen
    links.failed("d")
    assert links.is_up("d") and not links.is_good("d")
    for _ in range(10):
        links.failed("d")
    waited_s = 0
    while not links.is_good("d"):
        links.pass_time(1.0)
        waited_s += 1
    assert 1 < waited_s < 60
    for _ in range(60):
        links.pass_time(1.0)
    [*_, status] = links.take_changed()
    assert status.health == 1.0 and links.take_changed() == []


def test_one_that_is_not_up_is_not_good_and_cannot_fail() -> None:
    links = Links()
    links.failed("d")
    links.pass_time(1.0)
    assert not links.is_good("d") and links.take_changed() == []
