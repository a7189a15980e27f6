"""The teacher pass through verl's FSDP engine, without Ray: rows without a context, and logits where the response is.

    python -m benchmarks.teacher_pass [--rows 32] [--response 32] [--vocabulary 32768] [--rounds 3]

time    CPU seconds of a pass in which every other row has no context, against one in which all rows have one
memory  peak of what tensor operations allocate in a pass with prompts of 8 responses, against the same rows through
        verl's own pass, whose logits are made over prompt and response

One rank, float32, padded rows; a small random Qwen2 with a vocabulary as large as real ones.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import cost, machine, table


def start(folder: Path, vocabulary: int) -> Any:
    """A teacher's worker on this process."""
    from tests.support.teacher_worker import worker_config
    from tests.support.tiny_model import make_tiny_model

    os.environ |= {"VERL_PLATFORM": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    model = make_tiny_model(folder / "model", vocab=vocabulary, hidden=256, layers=4)
    from sdar_verl.verl.worker import TeacherWorker

    worker = TeacherWorker(config=worker_config(str(model), source="actor"), role="actor")
    worker.init_model()
    return worker


def rows_of(count: int, prompt: int, response: int, every: int) -> Any:
    """``count`` rows; every ``every``-th has no context."""
    from verl.utils import tensordict_utils as tu

    from sdar_verl.fields import TEACHER_PROMPTS
    from sdar_verl.requests import SCORING_PASS, ScoringPass
    from sdar_verl.table import nested
    from tests.support.teacher_worker import batch

    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> torch.Tensor:
        return torch.randint(3, 250, (length,), generator=generator)

    rows = [(drawn(prompt), answer := drawn(response), torch.ones_like(answer)) for _ in range(count)]
    data = batch(rows, calculate_entropy=False, compute_loss=False)
    empty = torch.zeros(0, dtype=torch.int32)
    data[TEACHER_PROMPTS] = nested([empty if every and i % every == 0 else row[0].int() for i, row in enumerate(rows)])
    tu.assign_non_tensor(data, **{SCORING_PASS: ScoringPass().to_json()})
    return data


def _line(what: str, ours: float, other: float, unit: str) -> list[str]:
    return [what, f"{ours:.2f} {unit}", f"{other:.2f} {unit}", f"{ours / other:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--response", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(machine("torch", "verl"))
    from tests.support.allocations import Allocations

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        worker = start(Path(folder), options.vocabulary)
        sizes = (options.rows, 8 * options.response, options.response)
        whole, half = [], []
        for _ in range(options.rounds):
            whole.append(cost(lambda: worker.compute_teacher_log_prob(rows_of(*sizes, 0))).cpu)
            half.append(cost(lambda: worker.compute_teacher_log_prob(rows_of(*sizes, 2))).cpu)
        peaks = []
        for ours in (True, False):
            data = rows_of(*sizes, 0)
            with Allocations() as seen:
                worker.compute_teacher_log_prob(data) if ours else worker.compute_log_prob(data)
            peaks.append(seen.peak)
        dist.destroy_process_group()
    lines = [
        _line("time, half of the rows without a context", min(half), min(whole), "s"),
        _line("peak memory, logits where the response is", peaks[0] / 1e6, peaks[1] / 1e6, "MB"),
    ]
    print(table(["what", "this pass", "against", "ratio"], lines))


if __name__ == "__main__":
    main()
