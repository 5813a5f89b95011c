from flowkv.engine.link_notes import LinkNotes
from flowkv.transfer.base import Linked


def test_every_link_is_told_once() -> None:
    notes = LinkNotes("prefill-0")
    notes.begun("decode-0", 0.0)
    notes.up(Linked("decode-0", "shm"))
    notes.tick(100.0)
    assert notes.take() == ["prefill-0 -> decode-0  shm"]
    assert notes.take() == []


def test_one_that_fails_is_told_with_its_reason() -> None:
    notes = LinkNotes("prefill-0")
    notes.begun("decode-0", 0.0)
    notes.failed("decode-0", "blocks of another size")
    notes.tick(100.0)
    assert notes.take() == ["prefill-0 -> decode-0  no link: blocks of another size"]


def test_one_that_takes_long_is_told_once_and_again_when_it_is_up() -> None:
    notes = LinkNotes("prefill-0")
    notes.begun("decode-0", 10.0)
    notes.tick(14.9)
    assert notes.take() == []
    notes.tick(15.0)
    notes.tick(30.0)
    [slow] = notes.take()
    assert slow.startswith("prefill-0 -> decode-0  no link after 5 s, still trying")
    notes.up(Linked("decode-0", "nixl"))
    assert notes.take() == ["prefill-0 -> decode-0  nixl"]


def test_a_peer_that_died_meanwhile_is_none_of_its_business() -> None:
    notes = LinkNotes("prefill-0")
    notes.begun("decode-0", 0.0)
    notes.gone("decode-0")
    notes.tick(100.0)
    assert notes.take() == []
