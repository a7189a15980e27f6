"""Time and peak memory of a divergence in chunks against all tokens at once, forward and backward, on the CPU.

    python benchmarks/distribution_memory.py [--cases 512x8192 2048x32768 4096x32768 1024x151936] [--hidden 512]

Every measurement is a process of its own with one thread. Time is the CPU's, of the fastest repeat. Memory is the peak
of the resident set above what the process held before, as the kernel counts it, with an allocator that gives freed
tensors back at once. "At once" is plain PyTorch with autograd; it starts from the student's logits, which verl's engine
has anyway and which are not counted, and (over the whole vocabulary) makes the teacher's. "Chunks" starts from hidden
states and counts everything, the products with the head and the gradient of its weights included. Both give reverse KL
and its gradients. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from sdar_verl.algorithm.divergence_rows import FullDivergence, TopKDivergence
from sdar_verl.algorithm.divergences import on_support, top_k_ids
from sdar_verl.algorithm.head_chunks import RowFunction, chunk_logits, map_logits
from sdar_verl.training.head.distributions import CHUNK_TOKENS

K = 100


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_bytes(run: Callable[[], None]) -> float:
    """Most bytes above the start during a call."""
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts anew
    run()
    return resident("VmHWM") - before


def cpu_seconds(run: Callable[[], None], repeats: int) -> float:
    """Of the fastest call."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def at_once(support: str, tokens: int, vocabulary: int, hidden: int) -> Callable[[], None]:
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


def in_chunks(support: str, tokens: int, vocabulary: int, hidden: int) -> Callable[[], None]:
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
    ids = torch.cat([top_k_ids(rows, K) for rows in student.split(64)])
    parts = zip(teacher_hidden.split(64), ids.split(64), strict=True)
    return ids, torch.cat([on_support(hidden @ teacher_weight.T, chosen) for hidden, chosen in parts])


def one(arguments: argparse.Namespace) -> None:
    """One measurement, printed."""
    torch.set_num_threads(1)
    tokens, vocabulary = (int(number) for number in arguments.cases[0].split("x"))
    make = {"at_once": at_once, "in_chunks": in_chunks}[arguments.way]
    make(arguments.support, 4, 128 + K, 16)()  # loads libraries, which are not to be counted
    run = make(arguments.support, tokens, vocabulary, arguments.hidden)
    print(peak_bytes(run) if arguments.quantity == "bytes" else cpu_seconds(run, arguments.repeats))


def measured(case: str, support: str, way: str, quantity: str, arguments: argparse.Namespace) -> float:
    """One measurement in a fresh process."""
    options = {
        "--cases": case,
        "--support": support,
        "--way": way,
        "--quantity": quantity,
        "--hidden": str(arguments.hidden),
        "--repeats": str(arguments.repeats),
    }
    command = [sys.executable, __file__, *(word for option in options.items() for word in option)]
    env = dict(os.environ)
    if quantity == "bytes":
        env["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # tensors above it have pages of their own, freed with them
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def main() -> None:
    """Every case in fresh processes, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["512x8192", "2048x32768", "4096x32768", "1024x151936"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--way", choices=["at_once", "in_chunks"], help=argparse.SUPPRESS)
    parser.add_argument("--quantity", choices=["bytes", "seconds"], help=argparse.SUPPRESS)
    parser.add_argument("--support", choices=["full", "top_k"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        one(arguments)
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, float32, hidden size ", end="")
    print(f"{arguments.hidden}, chunks of {CHUNK_TOKENS} tokens, top-k with k = {K}, best of {arguments.repeats}\n")
    print("| tokens | vocabulary | support | at once, MB | chunks, MB | memory | at once, s | chunks, s | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in arguments.cases:
        for support in ("full", "top_k"):
            got = {
                (way, quantity): measured(case, support, way, quantity, arguments)
                for way in ("at_once", "in_chunks")
                for quantity in ("bytes", "seconds")
            }
            memory, seconds = ([got[way, q] for way in ("at_once", "in_chunks")] for q in ("bytes", "seconds"))
            cells = [
                *case.split("x"),
                support,
                *(f"{number / 1e6:.0f}" for number in memory),
                f"{memory[1] / memory[0]:.1%}",
                *(f"{number:.2f}" for number in seconds),
                f"{seconds[1] / seconds[0]:.2f}",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
