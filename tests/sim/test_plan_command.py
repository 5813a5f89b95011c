"""`flowkv plan` as a user types it; simulations are made up where they do not matter."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flowkv import cli
from flowkv.config import ClusterConfig
from flowkv.sim import run
from flowkv.sim.figures import Distribution, Record, SimResult
from flowkv.sim.workload import TraceRequest

SLO = ("--slo-ttft", 2, "--slo-tpot", 0.05)


@dataclass
class Simulated:
    """Stands for `simulate`: a cluster of `n` instances takes `n` requests a second, half as many more if it splits
    evenly; of what comes faster none is in time."""

    configs: list[ClusterConfig] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __call__(self, config: ClusterConfig, requests: Iterable[TraceRequest], *, seed: int) -> SimResult:
        arrivals = [request.arrival_s for request in requests]
        self.configs.append(config)
        self.rates.append((len(arrivals) - 1) / (arrivals[-1] or 1.0))
        self.seeds.append(seed)
        capacity = len(config.roles) * (1.5 if config.prefill == config.decode > 0 else 1.0)
        ttft_s = 1.0 if self.rates[-1] <= capacity else 100.0
        records = [Record(i, arrival_s, 9, 2, "a", "b", ttft_s, ttft_s + 0.01) for i, arrival_s in enumerate(arrivals)]
        return SimResult(records, Distribution(), 60.0)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    simulated = Simulated()
    monkeypatch.setattr(run, "simulate", simulated)
    return simulated


def flowkv(*options: object) -> int:
    return cli.main(["plan", "--processes", "1", *map(str, options)])


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return content


# --- three questions -----------------------------------------------------------------------------------------------


def test_which_is_best(simulated: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flowkv("--poisson", 5, "--duration", 60, "--instances", 4, *SLO, "--seeds", 2, "--out", tmp_path) == 0
    told, notes = capsys.readouterr()
    assert "Splitting pays: 2P2D keeps 100.0% within the SLO where 4 mixed keep 0.0%." in told
    assert "  flowkv serve MODEL --prefill 2 --decode 2 --roles fixed --slo-ttft 2.0 --slo-tpot 0.05\n" in told
    assert "3P1D (least_loaded)" in told and "on 4 of llama-3.1-8b/h100; seeds 0 to 1" in told
    assert notes == "flowkv: simulating 14 configurations on all of the workload\n"
    assert set(simulated.seeds) == {0, 1} and simulated.rates[0] != simulated.rates[1]
    plan = read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (plan["splitting_pays"], plan["winner"]["name"], len(plan["rows"])) == (True, "2P2D", 14)
    assert plan["winner"]["overrides"]["prefill"] == 2 and plan["options"]["poisson"] == 5.0
    assert plan["commands"][0].startswith("flowkv serve MODEL --prefill 2")


def test_how_fast_requests_may_come(simulated: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--poisson", 5, "--duration", 60, "--instances", 4, *SLO, "--policies", "predicted_latency")
    assert flowkv(*options, "--max-rate", "--out", tmp_path) == 0
    told = capsys.readouterr().out
    assert "Splitting pays: 2P2D takes 5.9" in told and "requests/s (1.4" in told
    rows = {row["name"]: row for row in read(tmp_path)["rows"]}
    assert 3.9 < rows["4 mixed"]["requests_per_s"] <= 4.0
    assert 5.88 < rows["2P2D"]["requests_per_s"] <= 6.0


def test_how_few_instances_are_enough(simulated: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flowkv("--poisson", 7, "--duration", 60, "--instances", "1:12", *SLO, "--out", tmp_path) == 0
    rate = simulated.rates[0]
    assert 6 < rate <= 9
    least = 7 if rate <= 7 else 8
    assert f"Splitting pays: 6 instances (3P3D) keep 100.0% within the SLO; without splitting it takes {least}." in (
        capsys.readouterr().out
    )
    assert {row["num_instances"] for row in read(tmp_path)["rows"]} >= {12, least, 6}


def test_without_an_slo_latency_decides(simulated: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    assert flowkv("--poisson", 5, "--duration", 60, "--instances", 4) == 0
    told = capsys.readouterr().out
    assert "Splitting pays: 2P2D answers in 1.01 s on average where 4 mixed answer in 100 s on average." in told
    assert "answered" in told and "SLO" not in told


def test_one_instance_is_not_split(simulated: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    assert flowkv("--poisson", 0.5, "--duration", 60, "--instances", 1, *SLO) == 0
    assert "A single instance cannot be split: it keeps 100.0% within the SLO." in capsys.readouterr().out


def test_hardware_of_two_kinds(simulated: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    assert flowkv("--poisson", 2.5, "--duration", 60, "--cost", "llama-3.1-8b/l20:1,h20:1", *SLO) == 0
    told = capsys.readouterr().out
    assert "on 1 of llama-3.1-8b/l20 and 1 of llama-3.1-8b/h20" in told
    assert "flowkv join ADDRESS MODEL --role" in told
    assert ["llama-3.1-8b/h20", "llama-3.1-8b/l20"] in [config.simulate.cost for config in simulated.configs]


def test_dropped_early(simulated: Simulated, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--poisson", 10, "--duration", 90, "--instances", 8, *SLO)
    assert flowkv(*options) == 0
    assert "33.3%" in capsys.readouterr().out
    assert flowkv(*options, "--whole") == 0
    assert "33.3%" not in capsys.readouterr().out


def test_the_list_is_that_of_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    assert flowkv("--list") == 0
    assert "llama-3.1-70b/h20x4\n" in capsys.readouterr().out


# --- for real ------------------------------------------------------------------------------------------------------


def test_real_simulations_in_two_processes_give_the_same_plan_twice(tmp_path: Path) -> None:
    options = ["--poisson", "20", "--duration", "3", "--prompt-tokens", "50", "--output-tokens", "10"]
    plans = []
    for processes in ("2", "1"):
        cluster = ["--instances", "2", "--slo-ttft", "1", "--policies", "predicted_latency", "--out", str(tmp_path)]
        assert cli.main(["plan", *options, *cluster, "--processes", processes]) == 0
        plans.append(read(tmp_path))
    assert plans[0]["rows"] == plans[1]["rows"]
    assert {row["name"] for row in plans[0]["rows"]} == {"2 mixed", "1P1D", "flexible 1P1D"}
    assert plans[0]["winner"]["good_fraction"] == 1.0


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--trace {tmp}/none --instances 2", "none: cannot be read: No such file"),
        ("--trace {tmp}/broken --instances 2", "broken:1: "),
        ("--poisson 5", "there are no instances to plan with"),
        ("--poisson 5 --cost llama-3.1-8b/l20:2,h20", "there are no instances to plan with"),
        ("--poisson 5 --instances 3 --cost llama-3.1-8b/l20:2,h20:2", "add up to 4"),
        ("--poisson 5 --instances 2 --cost llama-3.1-8b/h1000", "there is no cost model llama-3.1-8b/h1000"),
        ("--poisson 5 --cost llama-3.1-8b/l20:2,llama-3.1-70b/h100x4:2", "a cluster serves one"),
        ("--poisson 5 --cost {tmp}/broken:2", "broken: not a profile"),
        ("--poisson 5 --instances 2 --slo-ttft 0", "slo.ttft_s is a positive number"),
        (
            "--poisson 5 --instances 2 --prompt-tokens 2000 --slo-ttft 0.045",
            "slo.ttft_s of 0.045 s cannot be kept: the shortest prompt, of 2000 tokens, takes at least 0.05",
        ),
        (
            "--poisson 5 --instances 2 --slo-tpot 0.001",
            "slo.tpot_s of 0.001 s cannot be kept: the shortest prompt, of 500 tokens, takes at least 0.00",
        ),
        ("--poisson 5 --instances 2 --slo-ttft 1 --target 1.5", "--target is a share"),
        ("--poisson 5 --instances 2 --slo-ttft 1 --target 0", "--target is a share"),
        ("--poisson 5 --instances 2 --max-rate", "need an SLO"),
        ("--poisson 5 --instances 2:4", "need an SLO"),
        ("--poisson 5 --instances 2:4 --slo-ttft 1 --max-rate", "--max-rate finds the rate of one number"),
        ("--poisson 5 --instances 2:4 --slo-ttft 1 --cost llama-3.1-8b/l20:2,h20:2", "takes one --cost"),
        ("--trace {tmp}/at_once --instances 2 --slo-ttft 1 --max-rate", "all of these requests arrive at once"),
        ("--poisson 5 --instances 2 --set engine.blocksize=1", "blocksize"),
        ("--poisson 5 --instances 2 --out {tmp}/broken", "broken: cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_runs(
    simulated: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    (tmp_path / "broken").write_text("{\n")
    (tmp_path / "at_once").write_text('{"timestamp": 0, "input_length": 6, "output_length": 7, "hash_ids": [3]}\n' * 2)
    before = sorted(tmp_path.iterdir())
    out = [] if "--out" in options else ["--out", tmp_path / "out"]
    assert flowkv(*options.format(tmp=tmp_path).split(), *out) == 1
    error = capsys.readouterr().err
    assert error.startswith("flowkv: error: ") and error.count("\n") == 1
    assert words in error
    assert not simulated.configs
    assert sorted(tmp_path.iterdir()) == before


def test_a_bound_on_tpot_asks_nothing_of_single_tokens(simulated: Simulated) -> None:
    assert flowkv("--poisson", 5, "--duration", 60, "--instances", 2, "--output-tokens", 1, "--slo-tpot", 0.001) == 0


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--poisson 1 --instances 0",
        "--poisson 1 --instances 4:2",
        "--poisson 1 --instances x",
        "--poisson 1 --seeds 0",
        "--poisson 1 --policies none",
    ],
)
def test_options_that_cannot_be(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        flowkv(*options.split())
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom flowkv import cli\n"
        "try:\n    cli.main(['plan', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(', '.join({'numpy', 'matplotlib', 'rich', 'torch'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-rate" in done.stdout
