"""How fast KV moves: the ladder from many calls to one, the peers on the same bytes, and what a hand-over costs.

Every figure is between two processes, on the KV geometry of Llama-3.1-8B, with memory that was touched before and
things that are compared measured in turns. `python -m benchmarks.transfer --help` runs it.
"""
