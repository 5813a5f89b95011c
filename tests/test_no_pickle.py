"""Nothing that comes from outside is unpickled or evaluated: no module of FlowKV has a call that could."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowkv

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "send_pyobj", "recv_pyobj"}
BETWEEN_PROCESSES = {"Pipe", "Queue", "SimpleQueue", "Manager", "Listener", "Client"}  # of multiprocessing: they pickle
FILES = sorted(Path(flowkv.__path__[0]).rglob("*.py"))


def findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names = {node.module or ""} if names != {"UnpicklingError"} else set()  # what torch raises
            if bad := {name.partition(".")[0] for name in names} & MODULES:
                yield f"line {node.lineno}: imports {', '.join(bad)}"
        elif isinstance(node, ast.Call):
            yield from call_findings(node)


def call_findings(call: ast.Call) -> Iterator[str]:
    name, owner = "", ""
    if isinstance(call.func, ast.Name):
        name = call.func.id
    elif isinstance(call.func, ast.Attribute):
        name = call.func.attr
        owner = call.func.value.id if isinstance(call.func.value, ast.Name) else "?"
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    is_builtin_elsewhere = name in ("eval", "exec") and owner  # model.eval()
    if (name in CALLS and not is_builtin_elsewhere) or (owner == "multiprocessing" and name in BETWEEN_PROCESSES):
        yield f"line {call.lineno}: calls {name}"
    if name == "load" and owner == "torch" and not is_true(keywords.get("weights_only")):
        yield f"line {call.lineno}: torch.load without weights_only"
    if "allow_pickle" in keywords and not is_false(keywords["allow_pickle"]):
        yield f"line {call.lineno}: allow_pickle"


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_pickle() -> None:
    assert len(FILES) > 100
    assert [f"{path}: {finding}" for path in FILES for finding in findings(path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle.x", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "socket.recv_pyobj()",
        "eval(text)", "multiprocessing.Queue()",
    ],
)  # fmt: skip
def test_it_would_be_found(source: str) -> None:
    assert list(findings(source))
