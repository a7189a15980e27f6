"""TRL's side of :mod:`benchmarks.peer_trl`: runs in TRL's environment, needs nothing of this package.

PYTHON_OF_TRL benchmarks/peer_trl_run.py SETTINGS.json OUT.json
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer


class Timed(SDPOTrainer):
    """Seconds of each phase, summed over a step."""

    seconds: dict[str, float] = {}  # noqa: RUF012  one trainer a process

    def _count(self, phase: str, begun: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return super()._generate(*args, **kwargs)
        finally:
            self._count("rollout", begun)

    def _forward_logits(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return super()._forward_logits(*args, **kwargs)
        finally:
            if not torch.is_grad_enabled():
                self._count("teacher", begun)


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        Timed.seconds.clear()
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append({**Timed.seconds, "step": time.perf_counter() - self.begun})


def right(text: str, truth: str) -> float:
    """GSM8K's strict form: the last number behind ####."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return float(bool(found) and found[-1] == truth)


def reward(completions: list[Any], truth: list[str], **kwargs: Any) -> list[float]:
    """Of TRL's form."""
    return [right(said[0]["content"], wanted) for said, wanted in zip(completions, truth, strict=True)]


@torch.no_grad()
def success(model: Any, tokenizer: Any, rows: list[dict[str, Any]], tokens: int) -> float:
    """Share of right answers, one sample each at temperature 1."""
    model.eval()
    tokenizer.padding_side, solved = "left", 0.0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        batch = tokenizer.apply_chat_template(
            [row["prompt"] for row in part], add_generation_prompt=True, padding=True, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        out = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        solved += sum(right(text, row["truth"]) for text, row in zip(texts, part, strict=True))
    return solved / len(rows)


def main() -> None:
    """Train, measure, write."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    tokenizer, clock = AutoTokenizer.from_pretrained(settings["model"]), Clock()
    before = success(model, tokenizer, settings["test"], settings["response"])
    rows = settings["prompts"] * settings["group"]
    trainer = Timed(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(settings["train"]),
        callbacks=[clock],
        args=SDPOConfig(
            output_dir=settings["out"],
            seed=settings["seed"],
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            num_generations=settings["group"],
            max_completion_length=settings["response"],
            max_steps=settings["steps"],
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            temperature=1.0,
            distillation_mode="full_logits",
            distillation_alpha=1.0,  # reverse KL
            distillation_is_clip=None,
            teacher_model_kind="live",
            use_successful_as_teacher=False,
            include_environment_feedback=True,  # the worked solution, where ours puts it
            feedback_template="{feedback_raw}",
            reprompt_template="{prompt}\n\n{solution}{feedback}",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    after = success(trainer.model, tokenizer, settings["test"], settings["response"])
    Path(sys.argv[2]).write_text(json.dumps({"steps": clock.steps, "before": before, "after": after}))


if __name__ == "__main__":
    main()
