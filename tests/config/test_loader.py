"""Settings from YAML files, presets and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2box.config import loader, validation
from gpt2box.errors import BadInput


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def aliases(depth: int) -> str:
    """2 · 9^depth values in a few lines."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth + 1)]
    return "\n".join([*lines, "dataset: x", f"seed: *a{depth}"])


@pytest.mark.parametrize("name", loader.list_presets())
def test_every_preset_is_valid(name: str) -> None:
    assert loader.load_config(name, {})[0].name == name


def test_scientific_notation_is_a_number_although_yaml_reads_a_string(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "dataset: x\nlearning_rate: 3e-4\nmax_steps: 1e5\ntokens_per_step: 4096\n")
    loaded = loader.load_config(path, {})[0]
    assert (loaded.learning_rate, loaded.max_steps) == (3e-4, 100_000)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\nseed: 2\n", "given twice: seed"),
        ("- a\n- b\n", "holds a list"),
        ("a: [", "cannot be read as settings"),
        ("dataset: x\nlearning_rate: .nan\n", "learning_rate"),
        ("dataset: x\nn_embd: 100\nn_head: 3\n", "multiple of n_head"),
        ("dataset: x\ntokens_per_step: 5000\n", "such as 4096 or 5120"),
        ("dataset: x\nmin_lr: 1\n", "at most learning_rate"),
        ("learning_rate: 1e-3\n", "dataset: missing"),
        ("dataset: x\nname: ../up\n", "run name"),
        ("dataset: x\nname: 2024-13-45\n", "cannot be read as settings"),
        ("a: " + "[" * 5000, "cannot be read as settings"),
        ("dataset: x\ngradient_accumulation_steps: .inf\n", "gradient_accumulation_steps"),
        ("dataset: x\ngradient_accumulation_steps: 2.5\n", "gradient_accumulation_steps"),
        ("dataset: x\ndevice: cuda:007\n", "device: found 'cuda:007'"),
    ],
)
def test_invalid_files_are_refused_with_the_reason(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(BadInput) as raised:
        loader.load_config(write(tmp_path / "c.yaml", text), {})
    assert part in str(raised.value)


def test_resolved_settings_survive_a_round_trip_through_yaml(tmp_path: Path) -> None:
    loaded = loader.load_config("demo", {"learning_rate": "2e-4", "sample_prompt": "Ü: #\n", "compile": "False"})[0]
    again = validation.validate(loader.read_yaml(Path(write(tmp_path / "c.yaml", loader.config_to_yaml(loaded)))), "c")
    assert again == loaded


def test_long_values_are_abbreviated_and_endless_ones_refused(tmp_path: Path) -> None:
    for depth, part in ((3, "seed: found [[["), (24, "more than 10,000 values")):
        with pytest.raises(BadInput) as raised:
            loader.load_config(write(tmp_path / "c.yaml", aliases(depth)), {})
        assert part in str(raised.value) and len(str(raised.value)) < 5000


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("max_steps: 0x" + "f" * 5000, "a number of 5,002 digits"),
        ("learning_rate: 1" + ":59" * 500 + ".5", "a number of 1,503 digits"),
        ("dataset: x\nmax_steps: 1e308\nlearning_rate: 0x" + "f" * 30, "max_steps: found '1e308'; expected N"),
        ("dataset: x\ntokens_per_step: 1e12\nsample_tokens: 1e9", "tokens_per_step: found 1000000000000; expected N"),
        ("a: &a {seed: 1}\n<<: *a", "<< is not used"),
        ("a: " + "x" * 2_000_000, "2,000,003 characters"),
    ],
)
def test_unusable_numbers_and_notations_are_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(BadInput) as raised:
        loader.load_config(write(tmp_path / "c.yaml", text), {})
    assert part in str(raised.value)


@pytest.mark.parametrize(
    "number", ["010", "1:30", "1:30.5", "-0_7", "1__0", "10_", "_10", "1_0_", "'1__0'", "١٢", "1e٣", "'1.5'", "true"]
)
@pytest.mark.parametrize("key", ["max_steps", "micro_batch_size", "save_minutes"])
def test_an_ambiguous_number_is_refused(tmp_path: Path, key: str, number: str) -> None:
    if (key, number) == ("save_minutes", "'1.5'"):
        return
    with pytest.raises(BadInput):
        loader.load_config(write(tmp_path / "c.yaml", f"dataset: x\n{key}: {number}\n"), {})


@pytest.mark.parametrize("number", ["10", "+10", "1_0", "1e1", "1.0E+1", "10.0", "0xa", "' 10 '"])
@pytest.mark.parametrize("key", ["max_steps", "eval_interval", "micro_batch_size"])
def test_common_notations_of_whole_numbers_are_accepted(tmp_path: Path, key: str, number: str) -> None:
    text = f"dataset: x\ntokens_per_step: 10_240\n{key}: {number}\n"
    assert getattr(loader.load_config(write(tmp_path / "c.yaml", text), {})[0], key) == 10


@pytest.mark.parametrize("key", ["out_dir", "data_dir"])
def test_none_is_no_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(BadInput, match="found None"):
        loader.load_config(write(tmp_path / "c.py", f"{key} = None\n"), {})


def test_a_model_size_beside_weights_of_another_size_is_refused() -> None:
    with pytest.raises(BadInput, match="--model gpt2-xl with init_from gpt2-medium"):
        loader.load_config("finetune", {"dataset": "x", "model": "gpt2-xl"})
    same = {"dataset": "x", "model": "gpt2-medium"}
    assert loader.load_config("finetune", {**same, "model": "gpt2", "init_from": "./mine"})[0].init_from == "./mine"
    assert loader.load_config("finetune", same)[0] == loader.load_config("finetune", {"dataset": "x"})[0]
