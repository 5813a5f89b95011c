import pytest

from flowkv.errors import ConfigError
from flowkv.launch.addresses import check_local, resolve_endpoint, resolve_host, source_address, take_place


def test_endpoints_become_numbers() -> None:
    assert resolve_endpoint("127.0.0.1:9000") == ("127.0.0.1", 9000)
    assert resolve_endpoint("[::1]") == ("::1", 8100)
    assert resolve_host("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        resolve_host("no.such.host.invalid")
    with pytest.raises(ConfigError, match="HOST:PORT"):
        resolve_endpoint("127.0.0.1:nine")


def test_only_an_address_of_this_node_will_do() -> None:
    check_local("127.0.0.1")
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1, which must be an address of this node"):
        check_local("192.0.2.1")
    for everywhere in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="says nothing to other nodes"):
            check_local(everywhere)


def test_the_way_to_a_host_has_an_address() -> None:
    assert source_address("127.0.0.1", 8100) == "127.0.0.1"


def test_a_place_is_for_one_launcher_until_nobody_holds_it() -> None:
    first, name = take_place("tcp://10.0.0.1:8100")
    second, other_name = take_place("tcp://10.0.0.1:8100")
    elsewhere, elsewhere_name = take_place("tcp://10.0.0.2:8100")
    assert len({name, other_name, elsewhere_name}) == 3
    held = first.dup()  # as an instance of this launcher holds it
    first.close()
    third, third_name = take_place("tcp://10.0.0.1:8100")
    assert third_name not in (name, other_name)
    held.close()
    again, again_name = take_place("tcp://10.0.0.1:8100")
    assert again_name == name
    for place in (second, elsewhere, third, again):
        place.close()
