"""The process behind a `Sandbox`: grammars in, verdicts out. What asks too much of it kills it."""

import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from flowkv.errors import GrammarError
from flowkv.grammar.compiler import compile_grammar
from flowkv.grammar.vocabulary import Vocabulary
from flowkv.types import Grammar

CPU_S = 0.5  # for one grammar
MAX_BYTES = 2**30  # of address space
_LENGTH_BYTES = 4

_decoder = msgspec.msgpack.Decoder(Grammar)


def main() -> None:
    """Until standard input ends. The first frame is a tokenizer (`small_tokenizer`), all others are grammars.

    Each has a verdict; the tokenizer's says that it has been read.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    vocabulary = None
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        if vocabulary is None:
            vocabulary = Vocabulary.of_small(frame.decode())
            write_frame(sys.stdout.buffer, b"")
            continue
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process, wherever it is
        verdict = _verdict(_decoder.decode(frame), vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(sys.stdout.buffer, verdict.encode())


def _verdict(grammar: Grammar, vocabulary: Vocabulary) -> str:
    """What is wrong with it; empty where nothing is."""
    try:
        compile_grammar(grammar, vocabulary).compute_bitmask()
    except GrammarError as error:
        return str(error)
    return ""


def read_frame(stream: BinaryIO) -> bytes | None:
    """None where the stream has ended, be it within a frame."""
    head = stream.read(_LENGTH_BYTES)
    length = int.from_bytes(head)
    frame = stream.read(length)
    return frame if len(head) == _LENGTH_BYTES and len(frame) == length else None


def write_frame(stream: BinaryIO, frame: bytes) -> None:
    stream.write(len(frame).to_bytes(_LENGTH_BYTES) + frame)
    stream.flush()


if __name__ == "__main__":
    main()
