"""Other people's programs against `flowkv serve`, each unmodified and in a virtual environment of its own.

    python -m benchmarks.clients                 # aiperf and lm-eval on the bundled model

aiperf (NVIDIA's load generator) makes a short profile run with `--goodput`; lm-eval (EleutherAI's harness) asks for
generations and for log probabilities of the recall task that the bundled model was trained on, and so must find an
accuracy of one or nearly. Nothing is fetched but the two packages: tokenizer and task are local.
"""

import argparse
import json
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks import BenchmarkError
from benchmarks.peers.environments import install, run_logged, versions
from benchmarks.report import ROOT, write_report
from benchmarks.spawn import ServerProcess, exit_on_sigterm
from flowkv.bundled import MODEL_FOLDER, MODEL_NAME
from flowkv.bundled.recall import VALUES, recall_task

SERVE = "--prefill 1 --decode 1 --threads 1"
AIPERF_STEPS = (("install", "aiperf==0.13.0"),)
LM_EVAL_STEPS = (("install", "lm_eval[api]==0.4.13", "transformers==5.23.0"),)
NUM_PROFILED, NUM_QUESTIONS = 30, 20
CONCURRENCY = 4
FILLER = "The evil that men do lives after them;\n"
_TASK = "flowkv_recall"


def aiperf(folder: Path, url: str, console: Console) -> dict[str, Any]:
    """A profile of streamed chats. BenchmarkError where it fails or finds an error."""
    python = install(folder, AIPERF_STEPS, console.print)
    artifacts = folder / "artifacts"
    command = [
        str(python.with_name("aiperf")), "profile", "--model", MODEL_NAME, "--tokenizer", str(MODEL_FOLDER),
        "--url", url, "--endpoint-type", "chat", "--streaming", "--request-count", str(NUM_PROFILED),
        "--concurrency", str(CONCURRENCY), "--isl", "100", "--osl", "32", "--random-seed", "1",
        "--goodput", "time_to_first_token:60000 inter_token_latency:60000",
        "--artifact-dir", str(artifacts), "--ui", "none",
    ]  # fmt: skip
    environment = [f"HF_HOME={folder / 'cache'}", "HF_HUB_OFFLINE="]  # offline it takes no folder for a tokenizer
    run_logged(["env", *environment, *command], folder / "aiperf.log", console.print)
    found = json.loads((artifacts / "profile_export_aiperf.json").read_text())
    names = ("request_count", "good_request_count", "request_error_rate")
    return {
        **versions(python, ["aiperf"]),
        **{name: found[name]["avg"] for name in names},
        "goodput_per_s": found["goodput"]["avg"],
        "ttft_ms": {name: found["time_to_first_token"][name] for name in ("p50", "p99")},
        "itl_ms": {name: found["inter_token_latency"][name] for name in ("p50", "p99")},
    }


def lm_eval(folder: Path, url: str, console: Console) -> dict[str, Any]:
    """Accuracy by generation and by log probability. BenchmarkError where it fails."""
    python = install(folder, LM_EVAL_STEPS, console.print)
    tasks, output = folder / "tasks", folder / "output"
    write_tasks(tasks)
    arguments = {
        "model": MODEL_NAME, "base_url": f"{url}/v1/completions", "num_concurrent": CONCURRENCY, "max_retries": 1,
        "tokenizer_backend": "huggingface", "tokenizer": MODEL_FOLDER,
    }  # fmt: skip
    before = set(output.rglob("results_*.json"))
    command = [
        str(python.with_name("lm_eval")), "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks", f"{_TASK}_generate,{_TASK}_choice", "--include_path", str(tasks), "--output_path", str(output),
    ]  # fmt: skip
    environment = [f"HF_HOME={folder / 'cache'}", "HF_HUB_OFFLINE=1", "HF_DATASETS_OFFLINE=1"]
    run_logged(["env", *environment, *command], folder / "lm_eval.log", console.print)
    [written] = set(output.rglob("results_*.json")) - before
    results = json.loads(written.read_text())["results"]
    return {
        **versions(python, ["lm_eval"]),
        "exact_match": results[f"{_TASK}_generate"]["exact_match,none"],
        "accuracy": results[f"{_TASK}_choice"]["acc,none"],
    }


def write_tasks(folder: Path) -> None:
    """The same questions twice: to be answered, and to be chosen an answer for."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "recall.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions(NUM_QUESTIONS, seed=0)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    generate = {
        "task": f"{_TASK}_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choice = {
        "task": f"{_TASK}_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (generate, choice):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))  # JSON is YAML


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts as the bundled model's chat template writes them, the answer, and it among others."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        task = recall_task(rng, FILLER * rng.randrange(5))
        [message] = task.messages
        name, _, value = task.answer.partition(" = ")
        others = rng.sample([other for other in VALUES if other != value], 3)
        choices = [task.answer, *(f"{name} = {other}" for other in others)]
        rng.shuffle(choices)
        prompt = f"<|user|>\n{message['content']}<|end|>\n<|assistant|>\n"
        label = choices.index(task.answer)
        found.append({"prompt": prompt, "answer": task.answer, "choices": choices, "label": label})
    return found


def run(url: str, folder: Path, console: Console) -> dict[str, Any]:
    """What each client found; `server` is what the server counted of them."""
    found = {"aiperf": aiperf(folder / "aiperf", url, console), "lm_eval": lm_eval(folder / "lm-eval", url, console)}
    instances = httpx.get(f"{url}/cluster", timeout=10.0).json()["instances"]
    num_transfers = sum(instance["counters"]["num_transfers"] for instance in instances)
    return {**found, "server": {"num_transfers": num_transfers}}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", default=SERVE, metavar="ARGS", help="`flowkv serve ARGS`")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "clients", help="of their environments")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "clients.json")
    return parser.parse_args(arguments)


def main() -> None:
    args, console = parse_arguments(), Console()
    exit_on_sigterm()
    try:
        with ServerProcess(shlex.split(args.serve), args.output.parent / "clients.log") as url:
            found = run(url, args.folder, console)
    except BenchmarkError as error:
        sys.exit(f"benchmarks.clients: {error}")
    console.print_json(data=found)
    write_report(args.output, {"options": {"serve": args.serve}, **found})
    console.print(f"wrote {args.output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
