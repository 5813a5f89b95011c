"""The same tokens from P -> D, from one mixed instance, and from `generate()`, for every architecture at hand."""

import functools
from pathlib import Path

import pytest
import torch

from flowkv.bundled import MODEL_FOLDER
from flowkv.config import EngineConfig
from flowkv.engine.runner import TorchRunner
from flowkv.grammar.matchers import Matchers
from flowkv.model.loading import LoadedModel, load_model
from flowkv.types import Role
from tests.cluster_in_process import Cluster
from tests.model.tiny_models import CONFIGS, VOCAB_SIZE, eager_model, save_model

TIE = 1e-4  # two logits nearer than this may come out in either order
MAX_TOKENS = 24
PROMPT_LENGTHS = [1, 2, 3, 15, 16, 17, 33, 64, 5, 90]
CONFIG = EngineConfig(block_size=4, max_batch_tokens=16, max_choices=16)


@pytest.fixture(scope="module", params=[*sorted(CONFIGS), "bundled"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bundled":
        return MODEL_FOLDER
    return save_model(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


def prompts() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"r{i}": torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
        for i, length in enumerate(PROMPT_LENGTHS)
    }


def cluster_of(loaded: LoadedModel, roles: list[Role], num_blocks: int = 512) -> Cluster:
    make_runner = functools.partial(TorchRunner, loaded, matchers=Matchers(None, 0))
    return Cluster(
        roles, num_blocks=num_blocks, config=CONFIG, layout=loaded.layout(CONFIG.block_size), make_runner=make_runner
    )


def answers(cluster: Cluster, **sampling: object) -> dict[str, list[int]]:
    """All prompts at once, so that steps mix both phases."""
    for request_id, prompt_ids in prompts().items():
        cluster.submit(request_id, prompt_ids, **({"max_tokens": MAX_TOKENS} | sampling))
    cluster.run()
    cluster.check_at_rest()
    return {request_id: cluster.ids(request_id) for request_id in prompts()}


def count_ties(model: torch.nn.Module, prompt_ids: list[int], output_ids: list[int]) -> int:
    """Teacher-forced on our own tokens: how often ours is the second of two logits that are as good as equal."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]
    num_ties = 0
    for row, token_id in zip(logits, output_ids, strict=True):
        best, second = row.topk(2).values.tolist()
        if int(row.argmax()) != token_id:
            assert best - second < TIE and row[token_id] >= second, f"{token_id} has {row[token_id]}, best is {best}"
            num_ties += 1
    return num_ties


def first_tie(model: torch.nn.Module, prompt_ids: list[int], output_ids: list[int]) -> int:
    """How many of the reference's own tokens come before one that rounding alone decides."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]
    best, second = logits.topk(2).values.unbind(-1)
    return next((i for i, gap in enumerate((best - second).tolist()) if gap < TIE), len(output_ids))


def generate(model: torch.nn.Module, prompt_ids: list[int]) -> list[int]:
    ids = torch.tensor([prompt_ids])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None
    )
    return [int(token_id) for token_id in out[0, len(prompt_ids) :]]


def test_greedy_tokens_are_those_of_generate(folder: Path) -> None:
    torch.set_num_threads(1)
    loaded = load_model(folder, "float32")
    pair = cluster_of(loaded, [Role.PREFILL, Role.DECODE])
    handed_over, mixed = answers(pair), answers(cluster_of(loaded, [Role.MIXED]))
    assert pair.nodes["prefill-0"].engine.counters.num_transfers == len(PROMPT_LENGTHS)
    reference = eager_model(folder)
    num_ties = 0
    for request_id, prompt_ids in prompts().items():
        expected = generate(reference, prompt_ids)
        for ours in (handed_over[request_id], mixed[request_id]):
            ties = count_ties(reference, prompt_ids, ours)
            assert ties or ours == expected
            num_ties += ties
    print(f"{num_ties} ties of rounding")


def test_preempted_requests_keep_their_tokens(folder: Path) -> None:
    torch.set_num_threads(1)
    loaded = load_model(folder, "float32")
    small = cluster_of(loaded, [Role.MIXED], num_blocks=40)
    ours = answers(small)
    assert small.nodes["mixed-0"].engine.counters.num_preemptions > 0
    reference = eager_model(folder)
    for request_id, prompt_ids in prompts().items():
        count_ties(reference, prompt_ids, ours[request_id])


def test_a_seed_gives_the_same_tokens_wherever_the_request_runs(folder: Path) -> None:
    torch.set_num_threads(1)
    loaded = load_model(folder, "float32")
    sampling = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "seed": 7, "frequency_penalty": 0.3}
    handed_over = answers(cluster_of(loaded, [Role.PREFILL, Role.DECODE]), **sampling)
    mixed = answers(cluster_of(loaded, [Role.MIXED]), **sampling)
    assert handed_over == mixed
    alone = cluster_of(loaded, [Role.MIXED])
    alone.submit("r9", prompts()["r9"], max_tokens=MAX_TOKENS, **sampling)
    alone.run()
    assert alone.ids("r9") == mixed["r9"]
