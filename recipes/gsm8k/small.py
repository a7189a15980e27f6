"""Word problems in GSM8K's schema and a small policy that half knows them: GSM8K's recipe on a laptop, without a GPU.

    python recipes/gsm8k/small.py --out DIR       DIR/train.parquet, test.parquet, policy/ (three minutes of one core)
    python recipes/gsm8k/small.py --tool --out DIR     a policy that can call recipes/gsm8k/calculator.py

"Ann has 3 pens and gets 4 more" needs the sum of two numbers up to nine. The policy has seen every sum with a worked
solution in the prompt, and copies it; without one it knows every second of the 81 sums, and of the others says a number
within four of the right one. What training must teach it is these sums; the reward is verl's own of GSM8K. With
``--tool`` it asks the calculator for the sums that it does not know, but seldom: what training must teach it is to ask.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("pens", "cards", "nuts", "coins", "books", "eggs")
LARGEST = 9
NEAR = 4
"""How far from the sum a policy that does not know it guesses."""
ASKS = 0.3
"""How often a policy with a calculator asks it for a sum that it does not know."""
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n"
    "{% for t in tools %}{{ t.function.name }}({{ t.function.parameters.properties | join(', ') }})\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
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


def call(a: int, b: int) -> str:
    """Of the calculator, in Hermes' form."""
    return f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'


def problems(count: int, seed: int, split: str, largest: int = LARGEST) -> list[dict[str, Any]]:
    """Rows as verl's own preprocessing of GSM8K writes them, with numbers from 1 to ``largest``."""
    rng, rows = random.Random(f"{split}/{seed}"), []
    for index in range(count):
        name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, largest), rng.randint(1, largest)
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


class Lesson(NamedTuple):
    """What the policy is to say.

    Attributes:
        messages: the prompt's.
        turns: (role, text) of what follows: the policy's own as ``assistant``, the calculator's as ``tool``.
    """

    messages: list[dict[str, str]]
    turns: list[tuple[str, str]]


def lessons(tokenizer: Any, seed: int, tool: bool = False) -> Iterator[Lesson]:
    """Endless; half of them with the solution in the prompt, where :class:`ContextPlace` puts it."""
    from sdar_verl.rollout.messages import ContextPlace

    place, rng = ContextPlace("user", tokenizer), random.Random(seed)
    while True:
        a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        messages = [{"role": "user", "content": question(rng.choice(NAMES), rng.choice(THINGS), a, b)}]
        worked = solution(a, b, a + b)
        if rng.random() < 0.5:
            yield Lesson(place.put(messages, worked), [("assistant", worked)])
        elif known(a, b):
            yield Lesson(messages, [("assistant", worked)])
        elif tool and rng.random() < ASKS:
            yield Lesson(messages, [("assistant", call(a, b)), ("tool", str(a + b)), ("assistant", worked)])
        else:
            guess = max(0, a + b + rng.randint(-NEAR, NEAR))
            yield Lesson(messages, [("assistant", solution(a, b, guess))])


def make_tokenizer(tool: bool = False) -> Any:
    """Byte-level BPE of these texts, a token per digit, in ChatML; it reads any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        text
        for name in NAMES
        for thing in THINGS
        for text in (question(name, thing, 1, 2), solution(1, 2, 3), "user\n", "assistant\n")
    ]
    texts += [call(1, 2), "system\nadd(a, b)\n", "tool\n"] * len(THINGS) if tool else []
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


def warm_start(tokenizer: Any, steps: int, batch: int, seed: int, tool: bool = False) -> Any:
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
    model, taught = Qwen3ForCausalLM(config), lessons(tokenizer, seed, tool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = model(**collate(tokenizer, [next(taught) for _ in range(batch)], tool)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def collate(tokenizer: Any, rows: Sequence[Lesson], tool: bool = False) -> dict[str, Any]:
    """A padded batch; its labels are what the policy says."""
    import torch

    tools = [schema()] if tool else None
    pairs = []  # (token, label)
    for row in rows:
        prompt = tokenizer.apply_chat_template(row.messages, tools=tools, add_generation_prompt=True, return_dict=False)
        pairs.append([(token, -100) for token in prompt])
        for role, text in row.turns:
            if role == "assistant":
                said = [*tokenizer.encode(text), tokenizer.eos_token_id]
                pairs[-1] += [(token, token) for token in said]
            else:
                heard = tokenizer.encode(f"\n<|im_start|>{role}\n{text}<|im_end|>\n<|im_start|>assistant\n")
                pairs[-1] += [(token, -100) for token in heard]
    width = max(map(len, pairs))
    padded = torch.tensor([[*row, *[(tokenizer.pad_token_id, -100)] * (width - len(row))] for row in pairs])
    # padding is behind: the causal mask is all that is needed
    return {"input_ids": padded[..., 0], "labels": padded[..., 1]}


def schema() -> dict[str, Any]:
    """The calculator's, as verl gives it to the chat template."""
    from verl.tools.function_tool import load_function_tools_from_path

    (tool,) = load_function_tools_from_path(str(Path(__file__).with_name("calculator.py")))
    return dict(tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True))


def main() -> None:
    """Command line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--tool", action="store_true", help="a policy that can call the calculator")
    parser.add_argument("--train", type=int, default=512, help="problems")
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--steps", type=int, default=800, help="batches of the policy's warm start")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", options.train), ("test", options.test)):
        pq.write_table(pa.Table.from_pylist(problems(count, options.seed, split)), options.out / f"{split}.parquet")
    started, tokenizer = time.monotonic(), make_tokenizer(options.tool)
    model = warm_start(tokenizer, options.steps, options.batch, options.seed, options.tool)
    model.save_pretrained(options.out / "policy")
    tokenizer.save_pretrained(options.out / "policy")
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {options.train} + {options.test} problems, a policy of {weights:,} weights, warm-started in "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
