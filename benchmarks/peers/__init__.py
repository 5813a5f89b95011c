"""FlowKV beside other engines: the same model, load and client, one run, taking turns.

`python -m benchmarks.peers --help` runs it; docs/peers.md says what is compared and how.
"""
