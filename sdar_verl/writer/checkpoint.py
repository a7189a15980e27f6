"""A checkpoint's weights in the place of verl's rollout servers, for a writer outside of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sdar_verl.config.context import WriterConfig
from sdar_verl.errors import ConfigError
from sdar_verl.rollout.answers import eos_token_ids
from sdar_verl.rollout.control import control_strings_of
from sdar_verl.writer.policy import PolicyWriter
from sdar_verl.writer.step import StepWriting

PROMPT_TOKENS = 8192
ANSWER_TOKENS = 1024
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class CheckpointClient:
    """Answers as verl's client does, one request after the other, by ``generate`` of transformers.

    Args:
        folder: of a model, as transformers reads it.
        tokenizer: its own.

    Attributes:
        positions: of the model; None where it names no limit.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        self._model = model.to(device)
        ends, pad = eos_token_ids(folder, tokenizer, model.generation_config), model.generation_config.pad_token_id
        # No penalties of the file's, which rollouts do not have.
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        self.positions: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    async def generate(self, *, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        """An object whose ``token_ids`` are the answer's."""
        import torch

        torch.manual_seed(sampling_params["seed"])
        prompt = torch.tensor([prompt_ids], device=self._model.device)
        warm = sampling_params["temperature"] > 0
        drawn = {"temperature": sampling_params["temperature"], "top_p": sampling_params["top_p"], "top_k": 0}
        with torch.inference_mode():
            row = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=sampling_params["max_tokens"],
                do_sample=warm,
                **(drawn if warm else {}),
            )
        return SimpleNamespace(token_ids=row[0, len(prompt_ids) :].tolist())


def checkpoint_writing(
    folder: Path, chat_template_kwargs: dict[str, Any] | None, max_tokens: int | None = None
) -> StepWriting:
    """A way to a writer that is the policy of a checkpoint.

    Prompts have up to 8,192 tokens, less where the model has fewer positions.

    Args:
        folder: a checkpoint's ``actor/huggingface``, or any model that transformers reads.
        chat_template_kwargs: of the run that made it (``data.apply_chat_template_kwargs``).
        max_tokens: of an answer, at most half of the model's positions; None: 1,024.

    Raises:
        ConfigError: the folder holds no model, no weights, or no chat template.
    """
    from transformers import AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ConfigError(f"--policy {folder} holds no model; name a checkpoint's actor/huggingface folder")
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise ConfigError(
            f"--policy {folder} has no weights beside its configuration; save them with the run "
            "(actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]), or merge them: "
            f"python -m verl.model_merger merge --backend fsdp --local_dir {folder.parent} --target_dir DIR"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"--policy {folder} has no chat template, so it cannot be asked; put the run's own beside it as "
            "chat_template.jinja (actor_rollout_ref.model.custom_chat_template), or name a model that has one"
        )
    client, answer = CheckpointClient(folder, tokenizer), max_tokens or ANSWER_TOKENS
    positions = client.positions or PROMPT_TOKENS + answer
    answer = min(answer, positions // 2)
    writer = PolicyWriter(
        lambda: client,
        tokenizer,
        WriterConfig(),
        prompt_tokens=min(PROMPT_TOKENS, positions - answer),
        answer_tokens=answer,
        temperature=1.0,
        seed=0,
        chat_template_kwargs=chat_template_kwargs,
    )
    return StepWriting(writer, control_strings_of(tokenizer, chat_template_kwargs))
