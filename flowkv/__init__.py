"""FlowKV: serving large language models with prefill and decode on different instances."""

__version__ = "0.1.0"
