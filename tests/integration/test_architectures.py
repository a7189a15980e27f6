"""Small random models of today's architectures through verl's main_ppo on the CPU, for two steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.architectures import ARCHITECTURES, attention_of, make_architecture
from tests.support.recipe_run import train_recipe

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CAPPED = "gemma2"  # whose logits are not the head's
OBJECTIVES = {"sampled": [], "reverse_kl": ["sdar.loss.objective=reverse_kl"]}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_two_steps(tmp_path: Path, kind: str, objective: str) -> None:
    if (kind, objective) == (CAPPED, "reverse_kl"):
        pytest.skip("refused before the start: test_checks_engine.py")
    model = make_architecture(tmp_path / "model", kind)
    run = train_recipe(
        tmp_path / "run",
        "sdar.context.sources=[answer]",
        f"actor_rollout_ref.model.override_config.attn_implementation={attention_of(kind)}",
        *OBJECTIVES[objective],
        model=model,
    )
    for step in (1, 2):
        metrics = run.metrics[step]
        assert metrics["sdar/context_share"] == 1
        assert abs(metrics["sdar/gap_mean"]) > 0
        assert metrics["actor/grad_norm"] > 0
        assert metrics["training/rollout_probs_diff_max"] < 1e-3, "the rollout's numbers are the trainer's"
    if objective == "sampled":
        assert run.metrics[1]["sdar/empty_context_gap"] < 1e-3
    else:
        assert run.metrics[1]["sdar/divergence"] > 0
