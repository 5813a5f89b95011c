"""Messages that nobody would send: the decoder refuses what is no message, and nobody dies of what is one."""

import contextlib
import random
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from benchmarks.chaos.havoc import Chaos
from flowkv import messages as m
from flowkv.errors import ProtocolError
from flowkv.server.frontend import Frontend
from flowkv.server.live_request import TextOptions
from flowkv.server.text.byte_tokenizer import ByteTokenizer
from flowkv.types import ModelInfo, Output, Request, Role, SamplingParams, TokenLogprobs
from flowkv.wire import AsyncMailbox, Outbox, SyncContext, decode, encode
from tests.cluster.rig import Rig
from tests.cluster_in_process import CONTROLLER, Cluster
from tests.e2e.server import eventually, serving
from tests.e2e.test_toy_cluster import complete, toy_tokens
from tests.heavy.mutate import damaged, mutated
from tests.test_wire import EXAMPLES

FULL = pytest.mark.slow
ROLES = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
INSTANCES = ["prefill-0", "prefill-1", "decode-2", "prefill-0~1", "nobody"]
REQUESTS = ["r0", "r1", "r2", "nothing"]
NAMES = {
    "p0.1": INSTANCES, "d0.1": INSTANCES, "p0": INSTANCES, "r0": REQUESTS, "r1": REQUESTS, "f0": ["f", "nobody"],
    "toy": ["m"], "0.1": ["0.1.0"],
}  # fmt: skip


def absurd(rng: random.Random, names: Mapping[str, Sequence[str]]) -> m.AnyMessage | None:
    """A message that decodes, with values that make no sense; None where the mutation is no message.

    `names` says what may stand for a name of the examples, so that some of it is about what is there.
    """
    return twisted(rng.choice(EXAMPLES), rng, names)


def twisted(message: m.Message, rng: random.Random, names: Mapping[str, Sequence[str]]) -> m.AnyMessage | None:
    tree = _renamed(msgspec.msgpack.decode(encode(message)), rng, names)
    try:
        return decode(msgspec.msgpack.encode(mutated(tree, rng)))
    except (ProtocolError, OverflowError):  # what msgpack itself cannot hold was never sent
        return None


def _renamed(node: Any, rng: random.Random, names: Mapping[str, Sequence[str]]) -> Any:
    if isinstance(node, list):
        return [_renamed(entry, rng, names) for entry in node]
    if isinstance(node, dict):
        return {key: _renamed(entry, rng, names) for key, entry in node.items()}
    return rng.choice(names[node]) if isinstance(node, str) and node in names else node


@pytest.mark.parametrize(("count", "seed"), [(3_000, 1), pytest.param(500_000, 2, marks=FULL)])
def test_no_exception_leaves_the_decoder_but_the_declared_one(count: int, seed: int) -> None:
    rng, num_decoded = random.Random(seed), 0
    for _ in range(count):
        frame = damaged(encode(rng.choice(EXAMPLES)), rng) if rng.random() < 0.8 else rng.randbytes(rng.randrange(300))
        try:
            decode(frame)
            num_decoded += 1
        except ProtocolError as error:
            assert str(error).startswith("undecodable")
    assert 0 < num_decoded < count


def test_no_size_in_a_message_takes_the_memory() -> None:
    """Before anything is made of it: a `Welcome` carries a whole configuration."""
    [welcome] = [message for message in EXAMPLES if isinstance(message, m.Welcome)]
    tree = msgspec.to_builtins(welcome)
    tree[3]["decode"] = 2**62
    with pytest.raises(ProtocolError, match="at most"):
        decode(msgspec.msgpack.encode(tree))


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(1_000, 3_000), marks=FULL)])
def test_no_message_kills_a_controller(seeds: range) -> None:
    for seed in seeds:
        rng, rig = random.Random(seed), Rig(*ROLES)
        for request_id in REQUESTS[:3]:
            rig.submit(request_id)
        for _ in range(50):
            if (message := absurd(rng, NAMES)) is not None:
                hand_to_controller(rig, message, seed)


def hand_to_controller(rig: Rig, message: m.AnyMessage, seed: int) -> None:
    try:
        rig.take(message)
    except ProtocolError:
        return
    except Exception as error:
        raise AssertionError(f"seed {seed}: {message}") from error
    rig.tick()


class Whispers(Cluster):
    """A cluster in which some messages are followed by a twisted copy."""

    last: m.AnyMessage | None = None
    num_twisted = 0
    probability = 0.0

    def _receive(self, receiver: str, message: m.Message) -> None:
        super()._receive(receiver, message)
        assert self.random is not None
        if self.random.random() < self.probability and (copy := twisted(message, self.random, {})) is not None:
            self.last, self.num_twisted = copy, self.num_twisted + 1
            with contextlib.suppress(ProtocolError):
                self._whisper(receiver, copy)

    def _whisper(self, receiver: str, message: m.Message) -> None:
        if receiver == CONTROLLER:
            self.controller.handle(message, self.now_s)
            self._carry_out_controller()
        else:
            super()._receive(receiver, message)

    def _hear(self, message: m.Message) -> None:
        """What comes out of it is of no interest."""


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(1_000, 1_300), marks=FULL)])
def test_no_message_kills_an_instance(seeds: range) -> None:
    for seed in seeds:
        cluster = Whispers(list(ROLES), seed=seed)
        rng = random.Random(seed)
        cluster.probability = 0.15
        for i in range(12):
            prompt_ids = [rng.randrange(256) for _ in range(rng.choice([1, 5, 30, 60]))]
            cluster.submit(f"r{i}", prompt_ids, max_tokens=rng.choice([1, 8, 30]), n=rng.choice([1, 3]))
        try:
            for _ in range(2_000):
                if not cluster.step():
                    cluster.pass_time()
        except Exception as error:
            raise AssertionError(f"seed {seed}, after {cluster.last}") from error
        assert cluster.num_twisted > 20


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(1_000, 4_000), marks=FULL)])
def test_no_message_kills_a_frontend(seeds: range) -> None:
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            context = SyncContext()
            outbox = Outbox(context)
            frontend = Frontend(
                "f", AsyncMailbox(context, f"ipc://{folder}/f"), outbox, f"ipc://{folder}/c", ByteTokenizer()
            )  # fmt: skip
            try:
                whisper_to_frontend(frontend, random.Random(seed))
            except Exception as error:
                raise AssertionError(f"seed {seed}") from error
            finally:
                frontend.close_mailbox()
                outbox.close(0.0)
                context.term()


def whisper_to_frontend(frontend: Frontend, rng: random.Random) -> None:
    model = ModelInfo(name="m", dtype="toy", vocab_size=256, max_model_tokens=1000)
    sampling = SamplingParams(max_tokens=10, n=3)
    requests = [Request(request_id=name, prompt_ids=[1], sampling=sampling) for name in REQUESTS[:3]]
    frontend._receive(m.ClusterStatus(True, model, 512, []))
    frontend.submit(requests, TextOptions(), 0.0)
    for _ in range(40):
        message: m.AnyMessage | None = m.Outputs("prefill-0", [some_output(rng)])
        if rng.random() < 0.8:
            message = (
                twisted(m.Outputs("prefill-0", [some_output(rng)]), rng, {})
                if rng.random() < 0.5
                else absurd(rng, NAMES)
            )
        try:
            if message is not None:
                frontend._receive(message)
        except ProtocolError:
            continue
        frontend.metrics.render()
        msgspec.json.encode(frontend.view())


def some_output(rng: random.Random) -> Output:
    logprobs = [TokenLogprobs(3, -1.0, [(3, -1.0)])]
    return Output(rng.choice(REQUESTS), rng.randrange(3), rng.randrange(4), [rng.randrange(256)], logprobs=logprobs)


ORDERS = (m.Drain, m.RegistrationRefused, m.Registered)  # which are obeyed: no mutation makes them absurd


@pytest.mark.parametrize(("count", "seed"), [(500, 1), pytest.param(20_000, 2, marks=FULL)])
def test_no_message_kills_a_process(count: int, seed: int) -> None:
    """What only a shell does with a message: sends answers to the addresses in it, connects to the pools in it."""
    rng, body = random.Random(seed), {"prompt": [7] * 50, "max_tokens": 20, "temperature": 0.0}
    with serving("--toy", "--set", "engine.check_integrity=true") as server:
        before = Chaos(server, seed).names()
        context = SyncContext()
        outbox = Outbox(context)
        for _ in range(count):
            message = absurd(rng, {})
            if message is not None and not isinstance(message, ORDERS):
                receiver = rng.choice(["controller", "frontend", "prefill-0", "decode-0"])
                outbox.send(f"ipc://{server.run_folder()}/{receiver}", message)
        outbox.close(10.0)
        context.term()
        assert complete(server, body) == toy_tokens({"r": body})["r"]
        eventually(lambda: server.client.get("/ready").status_code == 200, "it serves")
        assert Chaos(server, seed).names() == before
