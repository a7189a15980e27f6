"""Three ways to serve many short requests on a CPU, on the quick start's kind of load.

    python benchmarks/cpu_rollout.py [--threads 1] [--latency 0.03] [--repeats 5]

64 episodes run at the same time. Each asks five times for 12 to 20 tokens after a prompt of 90 to 120, and waits for
its environment in between. Prompts, lengths and waits come from fixed seeds. Arms:

slots         sdar_verl.local.scheduler: requests join and leave at every token.
batches       requests that arrive within 5 ms run as one batch with transformers' own cache, until its slowest ends.
transformers  transformers' own continuous batching: its paged cache, all 64 requests of one turn at once, no waits.

Prints tokens per second of wall time and CPU seconds per 1000 tokens, of the best repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from sdar_verl.local import start_policy
from sdar_verl.local.sampling import SamplingParams
from sdar_verl.local.scheduler import BatchScheduler

EPISODES, TURNS = 64, 5
Generate = Callable[[list[int], int], Awaitable[int]]


def slots(model) -> Generate:
    """The project's scheduler."""
    scheduler = BatchScheduler(model, eos_token_ids=[], max_num_seqs=EPISODES)

    async def generate(prompt: list[int], length: int) -> int:
        done = await asyncio.wrap_future(scheduler.submit(prompt, SamplingParams(length, logprobs=True)))
        return len(done.token_ids)

    return generate


def batches(model) -> Generate:
    """Collect for 5 ms, then run the batch to its end."""
    requests: asyncio.Queue = asyncio.Queue()
    tasks: list[asyncio.Task] = []

    @torch.inference_mode()
    def run(prompts: list[list[int]], lengths: list[int]) -> None:
        width = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        for _ in range(max(lengths)):
            out = model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            log_probs = out.logits[:, -1].log_softmax(-1)
            input_ids = torch.multinomial(log_probs.exp(), 1)
            log_probs.gather(1, input_ids)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = positions[:, -1:] + 1

    async def serve() -> None:
        while True:
            batch = [await requests.get()]
            await asyncio.sleep(0.005)
            while not requests.empty() and len(batch) < EPISODES:
                batch.append(requests.get_nowait())
            await asyncio.to_thread(run, [b[0] for b in batch], [b[1] for b in batch])
            for _, _, future in batch:
                future.set_result(None)

    async def generate(prompt: list[int], length: int) -> int:
        if not tasks:
            tasks.append(asyncio.create_task(serve()))
        future = asyncio.get_running_loop().create_future()
        await requests.put((prompt, length, future))
        await future
        return length

    return generate


async def play(generate: Generate, latency: float) -> int:
    """All episodes; returns the number of tokens."""

    async def episode(seed: int) -> int:
        rng = random.Random(seed)
        tokens = 0
        for _ in range(TURNS):
            prompt = [rng.randrange(3, 100) for _ in range(rng.randrange(90, 121))]
            tokens += await generate(prompt, rng.randrange(12, 21))
            await asyncio.sleep(latency * rng.uniform(0.5, 1.5))
        return tokens

    return sum(await asyncio.gather(*[episode(seed) for seed in range(EPISODES)]))


def transformers_own(model) -> int:
    """One turn of all episodes through ``generate_batch``; returns the number of tokens."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    rng = random.Random(0)
    prompts = [[rng.randrange(3, 100) for _ in range(rng.randrange(90, 121))] for _ in range(EPISODES)]
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=16, do_sample=True, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=32, num_blocks=512, max_batch_tokens=2048, return_logprobs=True
        ),
        progress_bar=False,
    )
    return sum(len(output.generated_tokens) for output in outputs.values())


def report(name: str, runs: list[tuple[int, float, float]]) -> None:
    """Print the best of ``runs``, each (tokens, wall seconds, CPU seconds)."""
    tokens = runs[0][0]
    wall, cpu = min(run[1] for run in runs), min(run[2] for run in runs)
    print(f"{name:<13} {tokens / wall:6.0f} tokens/s   {1000 * cpu / tokens:.3f} CPU s per 1000 tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--latency", type=float, default=0.03, help="mean wait for the environment, seconds")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(start_policy(), dtype=torch.float32, attn_implementation="sdpa").eval()

    def timed(function: Callable[[], int]) -> tuple[int, float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        return function(), time.perf_counter() - wall, time.process_time() - cpu

    async def both() -> None:
        for make in (slots, batches):
            generate = make(model)
            await play(generate, 0.0)  # warm-up
            runs = []
            for _ in range(args.repeats):
                wall, cpu = time.perf_counter(), time.process_time()
                tokens = await play(generate, args.latency)
                runs.append((tokens, time.perf_counter() - wall, time.process_time() - cpu))
            report(make.__name__, runs)

    print(f"threads {args.threads}, latency {args.latency} s, load average {os.getloadavg()[0]:.1f}")
    asyncio.run(both())
    report("transformers", [timed(lambda: transformers_own(model)) for _ in range(2)])


if __name__ == "__main__":
    main()
