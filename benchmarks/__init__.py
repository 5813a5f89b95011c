"""Programs that measure FlowKV. Each writes one JSON with the machine, the commit and the command."""


class BenchmarkError(Exception):
    """A benchmark cannot go on; the message is one line for the user."""
