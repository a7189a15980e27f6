"""Which room may import what: verl's privates and its queue stay in one, the algorithm knows torch alone."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdar_verl.errors import ConfigError
from sdar_verl.verl import symbols

PACKAGE = Path(__file__).parents[2] / "sdar_verl"
KNOWS_VERL = ("verl", "local")
"""The rooms that know verl's insides: the one for it, and the CPU's, which is made of verl's own interfaces."""

INSIDES = tuple(
    f"verl.{name}"
    for name in ("trainer", "workers", "single_controller", "protocol", "plugin", "experimental.separation")
)
ALLOWED = {
    # Registries that these only look names up in, and verl's documented base of agent loops.
    # An optimizer and a correction are made once with the run's settings, to see whether they can be.
    "checks/options.py": {"verl.workers.config.optimizer.build_optimizer"},
    "checks/modes.py": {
        "verl.trainer.ppo.v1.trainer_base.TRAINER_REGISTRY",
        "verl.trainer.ppo.rollout_corr_helper.compute_rollout_correction_and_rejection_mask",
    },
    "checks/run.py": {
        "verl.trainer.ppo.core_algos.ADV_ESTIMATOR_REGISTRY",
        "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY",
    },
    "doctor/probe.py": {"verl.trainer.ppo.core_algos.ADV_ESTIMATOR_REGISTRY", "verl.trainer.ppo.v1.trainer_base"},
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it; not those for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in ast.walk(node):
                child.__dict__["typing"] = True
    for node in ast.walk(tree):
        if getattr(node, "typing", False):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_verls_insides_and_its_queue_are_imported_in_one_room():
    found = {}
    for path in files():
        name = path.relative_to(PACKAGE).as_posix()
        if name.split("/")[0] in KNOWS_VERL:
            continue
        inside = {
            one
            for one in imports(path)
            if one.startswith(INSIDES) or one.startswith("transfer_queue") or re.match(r"verl\..*\._", one)
        }
        inside -= ALLOWED.get(name, set())
        if inside:
            found[name] = inside
    assert not found


def test_the_algorithm_imports_torch_alone():
    for path in sorted((PACKAGE / "algorithm").glob("*.py")):
        imported = set(imports(path))
        others = {one.split(".")[0] for one in imported} - set(sys.stdlib_module_names) - {"torch", "sdar_verl"}
        assert not others, f"{path.name}: {others}"
        ours = {one for one in imported if re.match(r"sdar_verl\.(?!algorithm)", one)}
        assert ours <= {
            "sdar_verl.errors.ConfigError",
            "sdar_verl.function_options.check_function_options",
            *(f"sdar_verl.errors.{name}" for name in ("origin", "require_free", "require_name")),
        }, f"{path.name}: {ours}"


def test_this_verl_has_all_that_is_needed():
    for group in symbols.NEEDED:
        assert list(symbols.missing(symbols.NEEDED[group])) == []


@pytest.mark.parametrize(
    ("needed", "told"),
    [
        ({"verl.trainer.ppo.v1.trainer_base:PPOTrainer._balance_rows": "batch"}, "has no PPOTrainer._balance_rows"),
        ({"verl.trainer.ppo.v1.trainer_base:PPOTrainer._balance_batch": "rows"}, "takes no rows"),
        ({"verl.trainer.ppo.v1.trainer_base:PPOTrainer.a|PPOTrainer.b": ""}, "has no PPOTrainer.a or PPOTrainer.b"),
        ({"verl.trainer.ppo.v9:PPOTrainer": ""}, "verl.trainer.ppo.v9 has no PPOTrainer"),
    ],
)
def test_a_renamed_symbol_is_an_error_that_names_it_and_the_remedy(needed, told, monkeypatch):
    for group in symbols.NEEDED.values():  # modules look at theirs when they are imported: before the table is another
        assert not list(symbols.missing(group))
    monkeypatch.setattr(symbols, "NEEDED", {"trainer": needed})
    with pytest.raises(ConfigError, match=r"verl 0\.9\.\d is not as sdar_verl .* needs it") as error:
        symbols.check("trainer")
    assert told in str(error.value)
    assert "pip install" in str(error.value)


def test_a_phase_that_verl_adds_to_its_step_is_not_left_out_silently(monkeypatch):
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    assert symbols.unknown_phases() == []

    def longer(self, metrics, timing_raw, sample_batch_size):
        batch = self._balance_batch(sample_batch_size, metrics=metrics)
        return self._weigh_batch(batch, timing_raw)

    monkeypatch.setattr(PPOTrainer, "_step_once", longer)
    with pytest.raises(ConfigError, match="its _step_once has a phase _weigh_batch, which would be left out"):
        symbols.check("trainer")


def test_every_overridden_method_of_verls_trainer_is_looked_up():
    """A method of verl's that our trainer overrides, or calls with an underscore, stands in the table."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from sdar_verl.step import LocalUpdate
    from sdar_verl.verl.trainer import SdarTraining

    known = {symbol.rsplit(".", 1)[-1] for symbol in symbols.NEEDED["trainer"]}
    ours = {*vars(SdarTraining), *vars(LocalUpdate)}
    overridden = {name for name in ours if callable(getattr(PPOTrainer, name, None))} - {"__init__"}
    assert overridden <= known | {"__module__", "__doc__"}
    source = ast.parse((PACKAGE / "step.py").read_text())
    called = {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    assert called <= known
