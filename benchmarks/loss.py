"""Time and peak memory of the losses, forward and backward, on the CPU.

    python -m benchmarks.loss [--part sampled|distributions] [--rounds 5]

sampled        an update from the last hidden states on, in verl's own functions: logits of all tokens, log-probs of the
               sampled ones, loss, and the gradients of the hidden states and of the head. Once with verl's
               ``ppo_loss`` (KL to a reference included, as in the paper), once with
               :func:`sdar_verl.verl.loss.sdar_loss`. "Loss alone" starts from log-probs: what the two functions
               cost without the product with the head
distributions  reverse KL over all tokens of the vocabulary, or over the likeliest, in chunks, against plain PyTorch
               with autograd on all tokens at once. "At once" starts from the student's logits, which verl's engine
               has anyway and which are not counted, and (over the whole vocabulary) makes the teacher's. "Chunks"
               starts from hidden states and counts everything, the products with the head and the gradient of its
               weights included

Time is the CPU's, both arms in turn, medians over the rounds; one thread. Memory is the peak of the resident set above
what the process held before, as the kernel counts it, in a process of its own, with an allocator that gives freed
tensors back at once. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from tensordict import TensorDict

from benchmarks.common import interleaved, machine, median, ratio, table
from sdar_verl.algorithm.divergence_rows import FullDivergence, TopKDivergence
from sdar_verl.algorithm.divergences import on_support, top_k_ids
from sdar_verl.algorithm.head_chunks import RowFunction, chunk_logits, map_logits
from sdar_verl.requests import CHUNK_TOKENS, TOP_K

PROMPT, RESPONSE = 384, 128
"""Tokens of a row of the part ``sampled``."""


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_bytes(run: Callable[[], object]) -> float:
    """Most bytes above the start during a call."""
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts anew
    run()
    return resident("VmHWM") - before


# ---------------------------------------------------------------- sampled


class MicroBatch:
    """Rows of one micro-batch as verl's engine hands them to a loss."""

    def __init__(self, tokens: int, vocabulary: int, hidden: int) -> None:
        from verl.utils import tensordict_utils as tu
        from verl.workers.config import ActorConfig

        from sdar_verl.config.loss import LossConfig
        from sdar_verl.fields import STEP_VALUES, TEACHER_LOG_PROBS, TEACHER_MASK
        from sdar_verl.method import Method, StepValues

        rows = max(1, tokens // (PROMPT + RESPONSE))
        self.inputs, self.weight, *_ = tensors(rows * (PROMPT + RESPONSE), vocabulary, hidden)
        self.inputs.requires_grad_()
        self.weight.requires_grad_()
        self.labels = torch.randint(vocabulary, (len(self.inputs),))
        self.settings = LossConfig()
        self.method = Method(self.settings)
        self.config = ActorConfig(
            strategy="fsdp2", rollout_n=2, use_dynamic_bsz=True, use_kl_loss=True, kl_loss_coef=0.01
        )
        mask = torch.ones(rows, RESPONSE, dtype=torch.int64)
        columns = {
            "response_mask": mask,
            "old_log_probs": -torch.rand(rows, RESPONSE) - 10,
            "ref_log_prob": -torch.rand(rows, RESPONSE) - 10,
            "advantages": torch.randn(rows, 1).expand(rows, RESPONSE),
            TEACHER_LOG_PROBS: -torch.rand(rows, RESPONSE) - 9,
            TEACHER_MASK: mask,
            "prompts": torch.ones(rows, PROMPT, dtype=torch.int64),
            "responses": torch.ones(rows, RESPONSE, dtype=torch.int64),
        }
        fields = {name: torch.nested.as_nested_tensor(list(c), layout=torch.jagged) for name, c in columns.items()}
        self.data = TensorDict(fields, batch_size=rows)
        values = StepValues(self.settings.coef, self.settings.beta)
        info = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": rows}
        tu.assign_non_tensor(self.data, **{STEP_VALUES: asdict(values)}, **info)
        self.offsets = torch.arange(rows + 1) * (PROMPT + RESPONSE)
        self.log_probs = self._log_probs().detach().requires_grad_()

    def _log_probs(self) -> torch.Tensor:
        from verl.utils.torch_functional import logprobs_from_logits

        return logprobs_from_logits(self.inputs @ self.weight.T, self.labels)

    def _loss(self, kind: str, log_probs: torch.Tensor) -> torch.Tensor:
        from verl.workers.utils.losses import ppo_loss

        from sdar_verl.verl.loss import sdar_loss

        output: dict[str, Any] = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, self.offsets)}
        if kind == "ppo":
            return ppo_loss(self.config, output, self.data)[0]
        return sdar_loss(self.config, self.method, output, self.data)[0]

    def update(self, kind: str) -> Callable[[], object]:
        """From hidden states on; ``kind`` is ``ppo`` or ``sdar``."""
        return lambda: torch.autograd.grad(self._loss(kind, self._log_probs()), [self.inputs, self.weight])

    def alone(self, kind: str) -> Callable[[], object]:
        """From log-probs on."""
        return lambda: torch.autograd.grad(self._loss(kind, self.log_probs), self.log_probs)


# ---------------------------------------------------------------- distributions


def at_once(support: str, tokens: int, vocabulary: int, hidden: int) -> Callable[[], object]:
    """All tokens in one piece."""
    inputs, weight, teacher_hidden, teacher_weight = tensors(tokens, vocabulary, hidden)
    student = (inputs @ weight.T).detach().requires_grad_()
    if support == "top_k":
        ids, teacher = teacher_on_support(student.detach(), teacher_hidden, teacher_weight)

    def run() -> None:
        log_p = student.log_softmax(-1)
        if support == "top_k":
            log_p = log_p.gather(-1, ids)
            rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()
            log_p, log_q = torch.cat([log_p, rest], -1), teacher
        else:
            log_q = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
        value = (log_p.exp() * (log_p - log_q)).sum()
        torch.autograd.grad(value, student)

    return run


def in_chunks(support: str, tokens: int, vocabulary: int, hidden: int) -> Callable[[], object]:
    """The package's way, with its default chunk."""
    inputs, weight, teacher_hidden, teacher_weight = tensors(tokens, vocabulary, hidden)
    inputs.requires_grad_()
    weight.requires_grad_()
    if support == "top_k":
        ids, teacher = teacher_on_support((inputs @ weight.T).detach(), teacher_hidden, teacher_weight)
        function: RowFunction = TopKDivergence("reverse_kl", ids, teacher, "bucket")
    else:
        function = FullDivergence(
            "reverse_kl", lambda rows: chunk_logits(teacher_hidden[rows], teacher_weight, None, 1.0)
        )

    def run() -> None:
        columns = map_logits(inputs, weight, function, chunk=CHUNK_TOKENS)
        torch.autograd.grad(columns[:, 0].sum(), [inputs, weight])

    return run


def tensors(tokens: int, vocabulary: int, hidden: int) -> list[torch.Tensor]:
    """Hidden states and heads of student and teacher."""
    torch.manual_seed(0)
    sizes = [tokens, vocabulary, tokens, vocabulary]
    return [torch.randn(size, hidden) / (hidden**0.5 if size == vocabulary else 1.0) for size in sizes]


def teacher_on_support(
    student: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the student's k likeliest tokens, and the teacher's log-probs, a few rows at a time."""
    ids = torch.cat([top_k_ids(rows, TOP_K) for rows in student.split(64)])
    parts = zip(teacher_hidden.split(64), ids.split(64), strict=True)
    return ids, torch.cat([on_support(hidden @ teacher_weight.T, chosen) for hidden, chosen in parts])


# ---------------------------------------------------------------- measuring


def arm(name: str, tokens: int, vocabulary: int, hidden: int) -> Callable[[], object]:
    """One measured function by its name: ``at_once-full``, ``chunks-top_k``, ``ppo``, ``sdar``, ..."""
    way, _, support = name.partition("-")
    if way in ("at_once", "chunks"):
        return {"at_once": at_once, "chunks": in_chunks}[way](support, tokens, vocabulary, hidden)
    return MicroBatch(tokens, vocabulary, hidden).update(way)


def one_peak(name: str, case: str, hidden: int) -> None:
    """Measure a peak in this process, printed."""
    tokens, vocabulary = (int(number) for number in case.split("x"))
    arm(name, 4, 128 + TOP_K, 16)()  # loads libraries, which are not to be counted
    print(peak_bytes(arm(name, tokens, vocabulary, hidden)))


def peak(name: str, case: str, hidden: int) -> float:
    """Bytes, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss", "--peak", name, "--cases", case, "--hidden", str(hidden)]
    env = dict(os.environ)
    # Every tensor has pages of its own, freed with it: a setting that keeps freed memory would hide the peak.
    env |= {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_TOP_PAD_": "0"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()[-1])


def compare(name: str, baseline: str, case: str, args: argparse.Namespace) -> list[str]:
    """Peaks in MB, their ratio, CPU seconds, their ratio; the baseline first."""
    tokens, vocabulary = (int(number) for number in case.split("x"))
    memory = [peak(which, case, args.hidden) for which in (baseline, name)]
    if name == "sdar":
        batch = MicroBatch(tokens, vocabulary, args.hidden)
        arms = {baseline: batch.update(baseline), name: batch.update(name)}
    else:
        arms = {which: arm(which, tokens, vocabulary, args.hidden) for which in (baseline, name)}
    costs = interleaved(arms, args.rounds, warm_up=args.rounds < 3)  # the median of three forgets the first
    return [
        *(f"{number / 1e6:.0f}" for number in memory),
        f"{memory[1] / memory[0]:.1%}",
        *(f"{median(costs[which]):.2f}" for which in (baseline, name)),
        f"{ratio(costs[name], costs[baseline]):.3f}",
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["sampled", "distributions"], help="only this one")
    parser.add_argument("--cases", nargs="+", default=["2048x32768", "4096x32768", "1024x151936"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        one_peak(args.peak, args.cases[0], args.hidden)
        return
    print(f"{machine('torch', 'verl')}; one thread, float32, hidden size {args.hidden}, {args.rounds} rounds")
    if args.part != "distributions":
        head = ["tokens", "vocabulary", "ppo, MB", "sdar, MB", "memory", "ppo, s", "sdar, s", "time", "loss alone, ms"]
        rows = []
        for case in args.cases:
            batch = MicroBatch(int(case.split("x")[0]), 256, 16)
            costs = interleaved({kind: batch.alone(kind) for kind in ("ppo", "sdar")}, max(args.rounds, 5))
            alone = " and ".join(f"{1000 * median(costs[kind]):.1f}" for kind in ("ppo", "sdar"))
            rows.append([*case.split("x"), *compare("sdar", "ppo", case, args), alone])
        print(f"\nRows of {PROMPT} prompt and {RESPONSE} response tokens:\n\n{table(head, rows)}", flush=True)
    if args.part != "sampled":
        head = ["tokens", "vocabulary", "support", "at once, MB", "chunks, MB", "memory", "at once, s", "chunks, s"]
        rows = [
            [*case.split("x"), support, *compare(f"chunks-{support}", f"at_once-{support}", case, args)]
            for case in args.cases
            for support in ("full", "top_k")
        ]
        print(f"\nChunks of {CHUNK_TOKENS} tokens, top-k with k = {TOP_K}:\n\n{table([*head, 'time'], rows)}")


if __name__ == "__main__":
    main()
