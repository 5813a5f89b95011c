"""Every error that FlowKV raises on purpose.

    FlowKVError
    |-- ConfigError      an option, a configuration key or the machine does not allow what was asked
    |-- ModelError       a model folder is missing, unreadable or of an architecture that cannot be served
    |-- PoolError        the KV pool cannot be made or mapped
    |-- ProtocolError    a message that cannot be decoded, or that its receiver must never get
    |-- TransferError    bytes could not be moved to a peer
    |-- GrammarError     a grammar or schema that an output is to follow cannot be compiled
    |-- WorkloadError    a trace is broken, or what was asked of a workload cannot be; names file and line
    `-- RequestError     a client's request is refused; carries the HTTP status and the OpenAI error fields

The command line turns every one of them into one line and a non-zero exit; the server turns `RequestError`
into an OpenAI-shaped body. Anything else is a bug and keeps its traceback.
"""


class FlowKVError(Exception):
    """Base of all errors with a message meant for the user."""


class ConfigError(FlowKVError):
    pass


class ModelError(FlowKVError):
    pass


class PoolError(FlowKVError):
    pass


class ProtocolError(FlowKVError):
    pass


class TransferError(FlowKVError):
    pass


class GrammarError(FlowKVError):
    pass


class WorkloadError(FlowKVError):
    pass


class SimulationError(FlowKVError):
    pass


class RequestError(FlowKVError):
    """A request that is refused before it costs anything.

    `status` is the HTTP status, `param` the offending field of the body, `code` a short machine-readable reason,
    `retry_after_s` when the same may be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
