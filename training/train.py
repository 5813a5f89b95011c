"""Train the bundled model: python training/train.py  (resumes from training/checkpoint; about an hour on two cores).

A small Llama (grouped-query attention) on Tiny Shakespeare, as plain text and as dialogue, mixed with the recall task
of `flowkv.bundled.recall`. Sequences grow over the stages, so that the model first learns to look a fact up and then to
look it up from far away. Every batch is a function of (seed, step): a resumed run sees what an unbroken one would.
"""

import argparse
import gzip
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flowkv.bundled.recall import NAMES, VALUES, ask, draw_facts, reply, state_facts

HERE = Path(__file__).parent
MODEL_DIR = HERE.parent / "flowkv" / "bundled" / "model"
VOCAB_SIZE = 1536
ROPE_THETA = 1e6  # half of a head's dimensions hardly turn over the whole context, and can compare contents
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# (until this fraction of the run, tokens a sequence)
STAGES = [(0.30, 256), (0.50, 512), (0.80, 1024), (1.0, 2048)]
TOKENS_PER_STEP = 8192
SHARES = {"copy": 0.05, "recall": 0.35, "dialogue": 0.20, "text": 0.40}  # of the kinds of documents


def read_corpus() -> str:
    return gzip.decompress((HERE / "tinyshakespeare.txt.gz").read_bytes()).decode()


def train_tokenizer(corpus: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the words of the recall task are repeated until each is a single token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = [form for name in NAMES for form in (name + "\n", f" {name}\n")] + [f" {value}\n" for value in VALUES]
    words += ["Recall\n", " =\n"]
    tokenizer.train_from_iterator([corpus, *(word * 3000 for word in words)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rms_norm_eps=1e-5,
    )


@torch.no_grad()
def plant_lookup(model: LlamaForCausalLM) -> None:
    """Start the first two layers from heads that look facts up; on an hour of two cores they do not form by themselves.

    Layer 0 writes beside each token a code (32 dimensions of the embedding) of the token before it and of the one
    before that. Layer 1 attends from a token to where its predecessor's code stands two places back ("name = " finds
    what followed "name ="), and, in its other group, to where its own code stands one place back, and copies what it
    finds there. Everything is trained on from here, and nothing is kept fixed.
    """
    std, code, one_back, two_back = 0.1, slice(1, 33), slice(33, 65), slice(65, 97)  # of the residual stream
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, std)
    embedding[:, 0] = 3 * std  # the same for all tokens: what heads that go by position alone can read
    embedding[:, 33:97] = 0
    size, half = 32, 16
    turns = torch.tensor([ROPE_THETA ** (-f / half) for f in range(half)])
    fast, slow = list(range(8)), [*range(7, 16), *range(7 + half, 16 + half)]
    previous = model.model.layers[0].self_attn
    for head, distance, target in ((0, 1, one_back), (1, 2, two_back)):
        for f in fast:
            previous.q_proj.weight[head * size + f, 0] = 2.2 * torch.cos(distance * turns[f])
            previous.q_proj.weight[head * size + f + half, 0] = -2.2 * torch.sin(distance * turns[f])
        previous.o_proj.weight[target, head * size : (head + 1) * size] = torch.eye(size) * std
    previous.k_proj.weight[fast, 0] = 2.2
    previous.v_proj.weight[:size, code] += torch.eye(size)
    lookup = model.model.layers[1].self_attn
    for head, group, query, key in ((0, 0, one_back, two_back), (3, 1, code, one_back)):
        for i, dimension in enumerate(slow):
            lookup.q_proj.weight[head * size + dimension, query.start + i] = 2.2
            lookup.k_proj.weight[group * size + dimension, key.start + i] = 2.2
        lookup.v_proj.weight[group * size : (group + 1) * size, code] += torch.eye(size)
        lookup.o_proj.weight[code, head * size : (head + 1) * size] = torch.eye(size) * 2 * std


class Corpus:
    """Token ids of the text, its lines and its dialogue, cut into documents of a wanted length."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        def encode(part: str) -> list[int]:
            return tokenizer.encode(part, add_special_tokens=False)

        self.encode = encode
        self.ids = encode(text)
        self.lines = [encode(line + "\n") for line in text.split("\n") if line]
        self.speeches = [encode(speech) for speech in text.split("\n\n") if speech]
        self.role = {role: encode(f"<|{role}|>\n") for role in ("user", "assistant")}
        self.end_turn = encode("<|end|>\n")
        self.words = [encode(word)[0] for word in (*NAMES, *(f" {w}" for w in (*NAMES, *VALUES)))]

    def turn(self, role: str, content: list[int]) -> list[int]:
        return [*self.role[role], *content, *self.end_turn]

    def text(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        start = rng.randrange(len(self.ids) - length)
        ids = [0, *self.ids[start : start + length - 1]]
        return ids, [1.0] * len(ids)

    def dialogue(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        ids, at = [0], rng.randrange(len(self.speeches) - 200)
        while len(ids) < length and at + 2 < len(self.speeches):
            ids += self.turn("user", self.speeches[at]) + self.turn("assistant", self.speeches[at + 1])
            at += 2
        return ids, [1.0] * len(ids)

    def copy(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """A random sequence, again and again; only the repetitions can be predicted and carry loss."""
        period = rng.randint(8, max(9, min(64, length // 2)))
        once = rng.choices(self.words, k=period)
        repeats = length // period
        return [0, *once * repeats], [0.0] * (period + 1) + [1.0] * (period * (repeats - 1))

    def recall(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Facts, filler, and as many questions as there are facts; the unpredictable facts carry no loss."""
        facts = draw_facts(rng, rng.randint(2, 8))
        asked = rng.sample(facts, len(facts))
        stated = self.encode(state_facts(facts))
        questions: list[int] = []
        weights: list[float] = []
        for i, (name, value) in enumerate(asked):
            question = self.encode("\n" * (i == 0) + ask(name))
            turn = (self.role["user"] if i else []) + question + self.end_turn
            answer = self.turn("assistant", self.encode(reply(name, value)))
            questions += turn + answer
            weights += [0.0] * len(turn) + [1.0] * (len(answer) - 3) + [4.0, 1.0, 1.0]
        filler: list[int] = []
        room = length - len(stated) - len(questions) - 3
        at = rng.randrange(len(self.lines) - 400)
        while len(filler) + len(self.lines[at]) <= room:
            filler += self.lines[at]
            at += 1
        head = [0, *self.role["user"], *stated]
        return [*head, *filler, *questions], [0.0] * len(head) + [0.3] * len(filler) + weights


def make_batch(corpus: Corpus, seed: int, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = random.Random(f"{seed}/{step}")
    rows, row_weights = [], []
    for _ in range(TOKENS_PER_STEP // length):
        ids: list[int] = []
        weights: list[float] = []
        make = getattr(corpus, rng.choices(list(SHARES), weights=list(SHARES.values()))[0])
        while len(ids) < length + 1:
            want = max(48, min(length + 1 - len(ids), int(length * rng.uniform(0.2, 1.05))))
            new_ids, new_weights = make(rng, want)
            ids += new_ids
            weights += new_weights
        rows.append(ids[: length + 1])
        row_weights.append(weights[: length + 1])
    return torch.tensor(rows), torch.tensor(row_weights)


def learning_rate(fraction: float) -> float:
    warm = min(1.0, fraction / 0.02)
    return 2e-3 * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * fraction)))


@torch.no_grad()
def recall_accuracy(model: LlamaForCausalLM, corpus: Corpus, length: int, num_docs: int = 24) -> float:
    """Share of answer words that teacher-forced greedy decoding gets right, over held-out documents."""
    right = total = 0
    for i in range(num_docs):
        ids, weights = corpus.recall(random.Random(f"held-out/{length}/{i}"), length)
        with torch.autocast("cpu", torch.bfloat16):
            best = model(torch.tensor([ids])).logits[0].argmax(-1)
        at = [k for k, weight in enumerate(weights) if weight == 4.0]
        right += sum(int(best[k - 1]) == ids[k] for k in at)
        total += len(at)
    return right / total


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(MODEL_DIR)
    tokenizer.save_pretrained(MODEL_DIR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1300, help="length of the whole run, over all resumptions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text = read_corpus()
    tokenizer = train_tokenizer(text)
    for word in [*NAMES, *(f" {w}" for w in (*NAMES, *VALUES))]:
        if len(tokenizer.encode(word, add_special_tokens=False)) != 1:
            raise SystemExit(f"{word!r} is not a single token")
    corpus = Corpus(text, tokenizer)
    model = LlamaForCausalLM(model_config())
    plant_lookup(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(corpus.ids)} tokens of text")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    state_file = args.checkpoint / "state.pt"
    step, spent_s = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent_s = state["step"], state["spent_s"]
    args.checkpoint.mkdir(parents=True, exist_ok=True)
    while step < args.steps:
        started_s = time.monotonic()
        fraction = step / args.steps
        length = next(length for until, length in STAGES if fraction <= until)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction)
        ids, weights = make_batch(corpus, args.seed, step, length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (losses * wanted).sum() / wanted.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent_s += time.monotonic() - started_s
        step += 1
        if step % 20 == 0:
            print(f"{spent_s:6.0f} s  step {step}  length {length}  loss {loss.item():.3f}", flush=True)
        if step % 100 == 0:
            accuracy = {n: round(recall_accuracy(model, corpus, n), 3) for n in (256, 512, 1024, 1900)}
            print(f"        recall {json.dumps(accuracy)}", flush=True)
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent_s": spent_s},
                state_file.with_suffix(".new"),
            )
            state_file.with_suffix(".new").rename(state_file)
    save(model, tokenizer)
    print(f"wrote {MODEL_DIR}")


if __name__ == "__main__":
    main()
