"""A frontend that is gone: nothing runs for it any more, and nobody is told of what it waited for."""

import pytest

from flowkv.errors import ProtocolError
from flowkv.messages import Abort, FrontendExited, FrontendHello, InstanceExited, Lost, Submit
from flowkv.types import Request, Role, SamplingParams
from tests.cluster.rig import Rig, of_type


def test_its_requests_are_aborted_wherever_they_may_be_and_all_forget_it() -> None:
    rig = Rig(Role.PREFILL, Role.DECODE)
    rig.submit("r")
    out = rig.take(FrontendExited("f"))
    for name in ("prefill-0", "decode-1"):
        assert [message for to, message in out if to == name] == [Abort("r"), FrontendExited("f", "f")]
    assert rig.controller.num_assignments == 0
    assert rig.controller.gone_addresses == ["f"]


def test_those_of_another_go_on() -> None:
    rig = Rig(Role.MIXED)
    rig.submit("r")
    rig.take(FrontendHello("f~1", "f~1"))
    rig.take(FrontendExited("f~2"))
    assert rig.controller.num_assignments == 1


def test_what_it_says_late_is_heard_by_nobody() -> None:
    rig = Rig(Role.MIXED)
    rig.take(FrontendExited("f"))
    assert rig.take(FrontendHello("f", "f")) == []
    request = Request(request_id="r", prompt_ids=range(20), sampling=SamplingParams(max_tokens=10))
    with pytest.raises(ProtocolError, match="before it has said hello"):
        rig.take(Submit("f", request))


def test_an_attempt_that_was_lost_is_not_told_to_it_again() -> None:
    rig = Rig(Role.MIXED)
    rig.submit("r")
    assert of_type(rig.take(InstanceExited("mixed-0", "killed")), Lost) == [Lost("r", died=True)]
    rig.take(FrontendExited("f"))
    assert rig.tick(1.0) == []
