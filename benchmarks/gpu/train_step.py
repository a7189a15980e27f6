"""The parts of an SDAR step on one GPU: tokens per second and share of the card's peak, in bf16.

    python benchmarks/gpu/train_step.py [--model 3b] [--minutes 7] [--out figures.json]
    python benchmarks/gpu/train_step.py --smoke                    a tiny model, on the CPU where there is no GPU

Needs torch and transformers, and this checkout, which is not installed: no verl, no download, random weights in the
sizes of Qwen2.5. Ends by itself after ``--minutes``; parts that did not get their turn are named.

student log-probs  forward of prompt and answer, log-probs of the answer (verl makes logits of all tokens; so does this)
teacher pass       the same answers behind longer prompts
GRPO update        forward, clipped surrogate, backward, AdamW; gradient checkpointing
SDAR update        the same with the gated distillation term of the package
loss alone         both losses from log-probs on, forward and backward
full vocabulary    reverse KL over all tokens of the vocabulary from the last hidden states on: plain autograd on all
                   tokens at once, then the package's chunks

Operations are those of the mathematics: 2 per weight and token forward, 4 backward, the head included and the embedding
not, plus causal attention; what gradient checkpointing computes again is not counted. Peaks are the data sheets' dense
bf16 figures. Times are medians; every part runs twice before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from sdar_verl.algorithm.divergence_rows import FullDivergence
from sdar_verl.algorithm.head_chunks import chunk_logits, map_logits
from sdar_verl.algorithm.loss import distillation_terms

# Teraflop/s in dense bf16, by a word of the card's name; the first that fits.
PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A6000": 155, "4090": 165}
MODELS = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, tied
    "0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "3b": (2048, 36, 16, 2, 11008, 151936, True),
    "7b": (3584, 28, 28, 4, 18944, 152064, False),
    "smoke": (64, 2, 4, 2, 128, 1000, True),
}
CHUNK = 128
EXIT_NO_GPU = 2


@dataclass
class Figure:
    """What was measured of one part.

    Attributes:
        part: its name.
        seconds: median of one pass.
        tokens: of one pass.
        tokens_per_second: of the part.
        share_of_peak: of the card's bf16 FLOP/s; None where they are unknown or there is little to multiply.
        peak_gb: most memory the GPU held, the model and optimiser included; None without a GPU.
    """

    part: str
    seconds: float
    tokens: int
    tokens_per_second: float
    share_of_peak: float | None
    peak_gb: float | None


class Bench:
    """Model, rows and parts.

    Args:
        model: a key of ``MODELS``.
        rows: of a micro-batch.
        prompt: tokens of the student's prompt.
        context: tokens that the teacher's prompt has more.
        answer: tokens of an answer.
        device: of all tensors.
    """

    def __init__(self, model: str, rows: int, prompt: int, context: int, answer: int, device: torch.device) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = MODELS[model]
        self.config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            tie_word_embeddings=tied,
            max_position_embeddings=prompt + context + answer,
            use_cache=False,
        )
        self.device, self.answer = device, answer
        self.config._attn_implementation = "sdpa"
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):  # drawn where it is used: billions of numbers take minutes on a CPU
            self.model = Qwen2ForCausalLM(self.config).eval()
        torch.set_default_dtype(torch.float32)
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=device.type == "cuda")
        ids = torch.randint(vocabulary, (rows, prompt + context + answer), device=device)
        self.teacher_ids, self.student_ids = ids, torch.cat([ids[:, context : context + prompt], ids[:, -answer:]], 1)
        self.mask = torch.ones(rows, answer, device=device)
        self.advantages = torch.randn(rows, 1, device=device).expand(rows, answer)
        with torch.no_grad():
            self.old, self.teacher = self.log_probs(self.student_ids), self.log_probs(self.teacher_ids)

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, answer), of the last ``answer`` ids; float32."""
        logits = self.model(input_ids=ids).logits[:, -self.answer - 1 : -1]
        # A row at a time: a float32 copy of all logits would be the largest tensor of the step.
        rows = [_row_log_probs(row, labels) for row, labels in zip(logits, ids[:, -self.answer :], strict=True)]
        return torch.stack(rows)

    def grpo(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Clipped surrogate, mean over tokens."""
        ratio = (log_probs - self.old).exp()
        worse = torch.maximum(-self.advantages * ratio, -self.advantages * ratio.clamp(0.8, 1.2))
        return (worse * self.mask).sum() / self.mask.sum()

    def sdar(self, log_probs: torch.Tensor) -> torch.Tensor:
        """The same, and the gated term with the paper's values."""
        terms = distillation_terms(log_probs, self.teacher, self.mask, beta=5.0)
        return self.grpo(log_probs) + 0.01 * terms.loss.sum() / self.mask.sum()

    def update(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """One optimiser step."""
        self.model.train()
        loss(self.log_probs(self.student_ids)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()

    def forward(self, ids: torch.Tensor) -> None:
        """Log-probs without gradient."""
        with torch.no_grad():
            self.log_probs(ids)

    def loss_alone(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """From log-probs on."""
        torch.autograd.grad(loss(leaf := self.old.clone().requires_grad_()), leaf)

    def full_vocabulary(self, chunks: bool) -> Callable[[], None]:
        """Reverse KL of all answer tokens and its gradients."""
        tokens, hidden = self.mask.numel(), self.config.hidden_size
        weight = self.model.lm_head.weight.detach().clone().requires_grad_()
        student, teacher = (torch.randn(tokens, hidden, device=self.device).to(weight.dtype) for _ in range(2))
        student.requires_grad_()

        def run() -> None:
            if chunks:
                function = FullDivergence(
                    "reverse_kl", lambda rows: chunk_logits(teacher[rows], weight.detach(), None, 1.0)
                )
                value = map_logits(student, weight, function, chunk=CHUNK)[:, 0].sum()
            else:
                log_p = (student @ weight.T).float().log_softmax(-1)
                log_q = (teacher @ weight.detach().T).float().log_softmax(-1)
                value = (log_p.exp() * (log_p - log_q)).sum()
            torch.autograd.grad(value, [student, weight])

        return run

    def operations(self, ids: torch.Tensor, *, backward: bool) -> float:
        """Of one pass over ``ids``."""
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        if not self.config.tie_word_embeddings:
            weights -= self.model.get_input_embeddings().weight.numel()
        length = ids.shape[1]
        # Scores and weighted sum: 4 per pair of positions and channel; half of the pairs are masked.
        attention = 2 * self.config.num_hidden_layers * self.config.hidden_size * length
        return ids.numel() * (2 * weights + attention) * (3 if backward else 1)

    def parts(self) -> list[tuple[str, Callable[[], None], int, float | None]]:
        """Name, function, tokens, operations (None: not counted)."""
        student, teacher = self.student_ids, self.teacher_ids
        once, thrice = self.operations(student, backward=False), self.operations(student, backward=True)
        more = self.operations(teacher, backward=False)
        answers = self.mask.numel()
        return [
            ("student log-probs", lambda: self.forward(student), student.numel(), once),
            ("teacher pass", lambda: self.forward(teacher), teacher.numel(), more),
            ("GRPO update", lambda: self.update(self.grpo), student.numel(), thrice),
            ("SDAR update", lambda: self.update(self.sdar), student.numel(), thrice),
            ("GRPO loss alone", lambda: self.loss_alone(self.grpo), answers, None),
            ("SDAR loss alone", lambda: self.loss_alone(self.sdar), answers, None),
            ("full vocabulary at once", self.full_vocabulary(chunks=False), answers, None),
            ("full vocabulary in chunks", self.full_vocabulary(chunks=True), answers, None),
        ]


def _row_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(tokens,) float32; made again in the backward pass instead of kept."""

    def compute(row: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(row.float(), labels, reduction="none")

    return torch.utils.checkpoint.checkpoint(compute, logits, use_reentrant=False)


def measure(bench: Bench, peak: float | None, deadline: float, repeats: int) -> tuple[list[Figure], list[str]]:
    """Figures of the parts, and the names of those for which there was no time."""
    figures, left = [], []
    cuda = bench.device.type == "cuda"
    for name, run, tokens, operations in bench.parts():
        if time.monotonic() > deadline:
            left.append(name)
            continue
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for number in range(2 + repeats):
            started = time.perf_counter()
            try:
                run()
            except torch.cuda.OutOfMemoryError:
                left.append(f"{name} (out of memory)")
                bench.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                break
            if cuda:
                torch.cuda.synchronize()
            if number >= 2:
                seconds.append(time.perf_counter() - started)
                if time.monotonic() > deadline:
                    break
        if seconds:
            middle = statistics.median(seconds)
            share = operations / middle / peak if operations and peak else None
            gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
            figures.append(Figure(name, middle, tokens, tokens / middle, share, gb))
    return figures, left


def peak_of(name: str) -> float | None:
    """FLOP/s of a card by its name, None where it is not known."""
    return next((1e12 * peak for word, peak in PEAKS.items() if all(part in name for part in word.split())), None)


def show(figures: list[Figure]) -> str:
    """As a Markdown table."""
    lines = ["| part | seconds | tokens | tokens/s | share of peak | GB |", "|---|---|---|---|---|---|"]
    for one in figures:
        share = "" if one.share_of_peak is None else f"{one.share_of_peak:.1%}"
        gb = "" if one.peak_gb is None else f"{one.peak_gb:.1f}"
        lines.append(
            f"| {one.part} | {one.seconds:.4f} | {one.tokens} | {one.tokens_per_second:.0f} | {share} | {gb} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if name != "smoke"], default="3b")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the student's prompt")
    parser.add_argument("--context", type=int, default=768, help="tokens that the teacher's prompt has more")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=7.0, help="no part begins or is repeated after these")
    parser.add_argument("--peak-tflops", type=float, help="of a card that is not in the list, dense bf16")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that the script runs")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    gpu = torch.cuda.is_available()
    if not gpu and not args.smoke:
        print(
            "no GPU: torch.cuda.is_available() is false, so nothing was measured. Run this on a machine with one GPU, "
            "or with --smoke to see that it runs.",
            file=sys.stderr,
        )
        return EXIT_NO_GPU
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if gpu else "no GPU, the CPU"
    peak = 1e12 * args.peak_tflops if args.peak_tflops else peak_of(name) if gpu else None
    sizes = ("smoke", 2, 24, 8, 8) if args.smoke else (args.model, args.rows, args.prompt, args.context, args.answer)
    bench = Bench(*sizes, device)
    figures, left = measure(bench, peak, deadline, args.repeats)

    import transformers

    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "peak_flops": peak,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": sizes[0],
        "rows": sizes[1],
        "prompt, context, answer": sizes[2:],
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n")
    print(show(figures))
    if args.smoke:
        print("\nA smoke test: these figures say nothing.")
    if gpu and peak is None:
        print(f"\n{name}: its peak is not known here; give --peak-tflops to see shares.")
    if left:
        print(f"\nNOT MEASURED: {', '.join(left)}")
    if args.out:
        args.out.write_text(json.dumps({**facts, "figures": [asdict(one) for one in figures], "left": left}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
