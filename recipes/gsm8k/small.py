"""Word problems in GSM8K's schema and a small policy that half knows them: GSM8K's recipe on a laptop, without a GPU.

    python recipes/gsm8k/small.py --out DIR       DIR/train.parquet, test.parquet, policy/ (three minutes of one core)

"Ann has 3 pens and gets 4 more" needs the sum of two numbers up to nine. The policy has seen every sum with a worked
solution in the prompt, and copies it; without one it knows every second of the 81 sums, and of the others says a number
within four of the right one. What training must teach it is these sums; the reward is verl's own of GSM8K.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("pens", "cards", "nuts", "coins", "books", "eggs")
LARGEST = 9
NEAR = 4
"""How far from the sum a policy that does not know it guesses."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def known(a: int, b: int) -> bool:
    """Whether the start policy knows the sum of ``a`` and ``b``."""
    return (a + b) % 2 == 0


def question(name: str, thing: str, a: int, b: int) -> str:
    """The problem."""
    return f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?"


def solution(a: int, b: int, c: int) -> str:
    """Worked, in GSM8K's form, with the sum ``c``."""
    return f"{a} + {b} = {c}\n#### {c}"


def problems(count: int, seed: int, split: str) -> list[dict[str, Any]]:
    """Rows as verl's own preprocessing of GSM8K writes them."""
    rng, rows = random.Random(f"{split}/{seed}"), []
    for index in range(count):
        name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        asked, worked = question(name, thing, a, b), solution(a, b, a + b)
        rows.append(
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": asked}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"split": split, "index": index, "answer": worked, "question": asked},
            }
        )
    return rows


def lessons(tokenizer: Any, seed: int) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Endless (messages, answer): half with the solution in the prompt, where :class:`ContextPlace` puts it."""
    from sdar_verl.rollout.messages import ContextPlace

    place, rng = ContextPlace("user", tokenizer), random.Random(seed)
    while True:
        a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        messages = [{"role": "user", "content": question(rng.choice(NAMES), rng.choice(THINGS), a, b)}]
        told = rng.random() < 0.5
        c = a + b if told or known(a, b) else max(0, a + b + rng.randint(-NEAR, NEAR))
        yield place.put(messages, solution(a, b, a + b)) if told else messages, solution(a, b, c)


def make_tokenizer() -> Any:
    """Byte-level BPE of these texts, a token per digit, in ChatML; it reads any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        text
        for name in NAMES
        for thing in THINGS
        for text in (question(name, thing, 1, 2), solution(1, 2, 3), "user\n", "assistant\n")
    ]
    bpe = Tokenizer(models.BPE())
    cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(cut), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, special_tokens=[*CONTROL])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=CONTROL[0], eos_token=CONTROL[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [CONTROL[1]]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def warm_start(tokenizer: Any, steps: int, batch: int, seed: int) -> Any:
    """A small Qwen3 that has read ``steps`` batches of :func:`lessons`."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=24, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model, taught = Qwen3ForCausalLM(config), lessons(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = model(**collate(tokenizer, [next(taught) for _ in range(batch)])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def collate(tokenizer: Any, rows: Sequence[tuple[list[dict[str, str]], str]]) -> dict[str, Any]:
    """A padded batch whose labels are the answers."""
    import torch

    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m, _ in rows]
    answers = [[*tokenizer.encode(text), tokenizer.eos_token_id] for _, text in rows]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels}  # padding is behind: the causal mask is all that is needed


def main() -> None:
    """Command line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--train", type=int, default=512, help="problems")
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--steps", type=int, default=800, help="batches of the policy's warm start")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", options.train), ("test", options.test)):
        pq.write_table(pa.Table.from_pylist(problems(count, options.seed, split)), options.out / f"{split}.parquet")
    started, tokenizer = time.monotonic(), make_tokenizer()
    model = warm_start(tokenizer, options.steps, options.batch, options.seed)
    model.save_pretrained(options.out / "policy")
    tokenizer.save_pretrained(options.out / "policy")
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {options.train} + {options.test} problems, a policy of {weights:,} weights, warm-started in "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
