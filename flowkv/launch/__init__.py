"""Launchers: `serve` starts a cluster on this node, `join` adds this node to one. Each is the parent of its processes.

Instances are forked from a server that has torch and transformers loaded (a toy's has neither), so that a second one
costs no second import; frontend and controller, which need no torch, do not come from such a server. Every child dies
with its parent, the KV pools die with the processes that map them, and the run folder goes with the last of them that
was told to remove it.
"""
