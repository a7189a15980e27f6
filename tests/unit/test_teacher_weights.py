"""The teacher's own weights: averaging, swapping and saving, on plain modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdar_verl.errors import TeacherError
from sdar_verl.teacher.weights import ShadowWeights, trainable_shards


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def step(module: nn.Module, seed: int) -> None:
    """Something that moves every weight, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_the_average_is_the_weighted_sum_of_all_past_weights(decay):
    """theta_T(n) = d^n theta(0) + (1 - d) sum_k d^(n-k) theta(k), in float64."""
    module = network()
    shadow = ShadowWeights(module, dtype=torch.float64)
    expected = {name: value.double() * decay**5 for name, value in values(module).items()}
    for k in range(1, 6):
        step(module, k)
        shadow.blend(decay)
        for name, value in values(module).items():
            expected[name] += (1 - decay) * decay ** (5 - k) * value.double()
    with shadow.swapped_in():
        for name, value in values(module).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_an_average_with_equal_weights_does_not_move_a_bit():
    module = network()
    shadow = ShadowWeights(module, dtype=torch.float32)
    start = values(module)
    for _ in range(100):
        shadow.blend(0.97)
    with shadow.swapped_in():
        assert equal(values(module), start)


def test_decay_zero_copies():
    module = network()
    shadow = ShadowWeights(module, dtype=torch.float32)
    step(module, 1)
    shadow.blend(0.0)
    student = values(module)
    with shadow.swapped_in():
        assert equal(values(module), student)


def test_a_bf16_models_average_moves_because_it_is_kept_in_float32():
    module = network(dtype=torch.bfloat16)
    start = values(module)
    kept, rounded = ShadowWeights(module, dtype=torch.float32), ShadowWeights(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.01)  # bf16 resolves steps of 0.4 to 0.8 %
    for _ in range(400):
        kept.blend(0.999)
        rounded.blend(0.999)
    with kept.swapped_in():
        assert not equal(values(module), start)
    with rounded.swapped_in():
        assert equal(values(module), start), "bf16 would have done; then float32 is a waste"


def test_a_swap_computes_with_the_teachers_weights_and_gives_the_actors_back_to_the_bit():
    module, inputs = network(), torch.randn(5, 4)
    teacher_output = module(inputs)
    shadow = ShadowWeights(module)
    step(module, 1)
    student, student_output = values(module), module(inputs)
    for _ in range(3):
        with shadow.swapped_in():
            assert torch.equal(module(inputs), teacher_output)
        assert equal(values(module), student)
        assert torch.equal(module(inputs), student_output)


def test_an_optimizer_goes_on_with_the_actors_weights_after_a_swap():
    """The same training with and without a teacher pass between backward and step, to the bit."""

    def train(with_pass: bool) -> dict[str, torch.Tensor]:
        module, inputs = network(), torch.ones(5, 4)
        shadow = ShadowWeights(network(seed=9))
        shadow._module = module
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(inputs).square().sum().backward()
            if with_pass:
                with shadow.swapped_in(), torch.no_grad():
                    module(inputs)
            optimizer.step()
        return values(module)

    assert equal(train(with_pass=True), train(with_pass=False))


def test_the_actors_weights_come_back_after_an_exception():
    module = network()
    shadow = ShadowWeights(module)
    step(module, 1)
    student = values(module)
    with pytest.raises(RuntimeError, match="out of memory"), shadow.swapped_in():
        raise RuntimeError("out of memory")
    assert equal(values(module), student)


def test_a_swap_leaves_the_teachers_weights_alone():
    module = network()
    shadow = ShadowWeights(module)
    teacher = values(module)
    step(module, 1)
    with shadow.swapped_in():
        step(module, 2)  # nobody should, but the copy must not be the module's own storage
    with shadow.swapped_in():
        assert equal(values(module), teacher)


def test_frozen_parameters_are_not_copied():
    module = network()
    module[0].requires_grad_(False)
    assert set(trainable_shards(module)) == {"2.weight", "2.bias"}


def test_tied_parameters_are_copied_once():
    module = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    assert set(trainable_shards(module)) == {"embed.weight"}


def test_saved_weights_come_back_bit_for_bit(tmp_path):
    module = network()
    shadow = ShadowWeights(module, dtype=torch.float32)
    step(module, 1)
    shadow.blend(0.37)
    file = tmp_path / "actor" / "teacher.pt"
    shadow.save(file, step=7, updates=1)
    assert [path.name for path in file.parent.iterdir()] == ["teacher.pt"]

    other = ShadowWeights(network(seed=5), dtype=torch.float32)
    assert other.load(file) == {"step": 7, "updates": 1}
    with shadow.swapped_in():
        expected = values(module)
    with other.swapped_in():
        assert equal(values(other._module), expected)


def test_a_checkpoint_without_a_teacher_is_named(tmp_path):
    with pytest.raises(TeacherError, match=r"no weights of the teacher.*sdar\.teacher\.source"):
        ShadowWeights(network()).load(tmp_path / "teacher.pt")


def test_a_teacher_of_another_model_is_refused(tmp_path):
    ShadowWeights(nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))).save(tmp_path / "teacher.pt")
    with pytest.raises(TeacherError, match=r"another model.*0\.bias"):
        ShadowWeights(network()).load(tmp_path / "teacher.pt")


def test_a_changed_module_is_named():
    module = network()
    shadow = ShadowWeights(module)
    module[0].weight.requires_grad_(False)
    with pytest.raises(TeacherError, match=r"0\.weight"), shadow.swapped_in():
        pass
