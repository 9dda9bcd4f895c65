"""Settings: one definition, checked whole, with nanoGPT's files and names understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2box.config import loader, nanogpt, schema, validation
from gpt2box.errors import BadInput

DOCS = Path(__file__).parents[1] / "docs" / "coming-from-nanogpt.md"
TWELVE_GIB = DOCS.read_text().split("```python\n")[1].split("```")[0]  # what users read is what is tested


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", loader.list_presets())
def test_every_shipped_config_is_valid(name: str) -> None:
    assert loader.load_config(name, {})[0].name == name


def test_every_setting_is_described_and_belongs_to_a_group() -> None:
    for key, field in schema.Config.model_fields.items():
        assert field.description and isinstance(field.json_schema_extra, dict) and field.json_schema_extra["group"], key


def test_all_faults_are_told_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.yaml", "dataset: x\nlearning_rat: 1\ndropout: 2\nmax_steps: many\nseed: 1.5\ncompile: 3\n"
    )
    with pytest.raises(BadInput) as raised:
        loader.load_config(path, {})
    text = raised.value.found
    assert "5 faults" in text
    assert "learning_rat: no such setting; did you mean learning_rate?" in text
    assert "dropout: found 2" in text and "max_steps: found 'many'" in text and "seed: found 1.5" in text


def test_scientific_notation_is_a_number_although_yaml_calls_it_a_string(tmp_path: Path) -> None:
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
def test_bad_files_are_refused_with_the_reason(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(BadInput) as raised:
        loader.load_config(write(tmp_path / "c.yaml", text), {})
    assert part in str(raised.value)


def test_resolved_settings_read_back_the_same(tmp_path: Path) -> None:
    loaded = loader.load_config("demo", {"learning_rate": "2e-4", "sample_prompt": "Ü: #\n", "compile": "False"})[0]
    again = validation.validate(loader.read_yaml(Path(write(tmp_path / "c.yaml", loader.config_to_yaml(loaded)))), "c")
    assert again == loaded


def test_the_12_gib_config_of_nanogpt_works_as_it_stands(tmp_path: Path) -> None:
    loaded, notes = loader.load_config(write(tmp_path / "medium12.py", TWELVE_GIB + "backend = 'nccl'\n"), {})
    assert loaded.shape() == {"n_layer": 24, "n_head": 16, "n_embd": 1024}
    assert (loaded.micro_batch_size, loaded.block_size, loaded.tokens_per_step) == (4, 512, 65_536)
    assert (loaded.learning_rate, loaded.min_lr, loaded.warmup_steps, loaded.decay_steps) == (3e-4, 3e-5, 2000, 100_000)
    assert (loaded.compile, loaded.dtype, loaded.bias, loaded.dataset) == (True, "bfloat16", False, "openwebtext")
    assert (loaded.eval_interval, loaded.eval_windows, loaded.log_interval) == (500, 400, 10)
    assert any("backend" in note for note in notes)


def test_every_name_of_nanogpts_train_py_is_known() -> None:
    # The assignments at the top of its train.py and the options its users' scripts pass.
    names = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
        wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd
        dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters
        min_lr backend device dtype compile data_dir"""
    assert not [
        name
        for name in re.findall(r"\w+", names)
        if name not in nanogpt.NANOGPT_FLAGS and name not in schema.Config.model_fields
    ]
    mentioned = DOCS.read_text()
    assert not [name for name in nanogpt.NANOGPT_FLAGS if name not in mentioned and not name.startswith("wandb")]


def test_a_smaller_batch_flag_keeps_the_files_tokens_per_step(tmp_path: Path) -> None:
    path = write(tmp_path / "c.py", "batch_size = 4\nblock_size = 512\ngradient_accumulation_steps = 4 * 8\n")
    loaded = loader.load_config(path, {"batch_size": "2"})[0]
    assert (loaded.micro_batch_size, loaded.tokens_per_step) == (2, 65_536)
    loaded = loader.load_config(path, {"batch_size": "2", "gradient_accumulation_steps": "8"})[0]
    assert (loaded.micro_batch_size, loaded.tokens_per_step) == (2, 8192)


def test_accumulation_without_a_batch_is_refused_and_not_guessed() -> None:
    with pytest.raises(BadInput, match="without a batch_size"):
        loader.load_config("shakespeare", {"gradient_accumulation_steps": "10"})
    assert loader.load_config("shakespeare", {"eval_iters": "10"})[0].eval_windows == 40


def test_nanogpts_flags_win_over_our_files() -> None:
    loaded = loader.load_config(
        "shakespeare", {"batch_size": "4", "gradient_accumulation_steps": "2", "eval_iters": "5"}
    )[0]
    assert (loaded.tokens_per_step, loaded.eval_windows) == (4 * 1024 * 2, 5 * 4)


def test_a_smaller_batch_flag_changes_nothing_that_a_resume_would_refuse(tmp_path: Path) -> None:
    path = write(tmp_path / "c.py", "batch_size = 12\nblock_size = 64\neval_iters = 20\n")
    before, after = loader.load_config(path, {})[0], loader.load_config(path, {"batch_size": "4"})[0]
    changed = [key for key in schema.Config.model_fields if getattr(before, key) != getattr(after, key)]
    assert changed == ["micro_batch_size"] and after.name == "c"


def test_nanogpts_finetune_command_line_works() -> None:
    flags = {
        "init_from": "gpt2-medium",
        "data_dir": "data/mine",
        "max_iters": "5000",
        "learning_rate": "3e-5",
        "dtype": "bfloat16",
        "batch_size": "4",
        "block_size": "512",
    }
    loaded = loader.load_config(None, flags)[0]
    assert (loaded.dataset, loaded.max_steps, loaded.micro_batch_size, loaded.name) == (
        "data/mine",
        5000,
        4,
        "gpt2-medium-mine",
    )


def test_two_names_of_one_setting_are_refused() -> None:
    with pytest.raises(BadInput, match="another name of micro_batch_size"):
        loader.load_config("demo", {"batch_size": "2", "micro_batch_size": "4"})


@pytest.mark.parametrize(
    "line",
    [
        "n_layer = __import__('os').system('touch pwned')",
        "n_layer = [1 for x in range(9)]",
        "n_layer = 9 ** 9 ** 9",
        "n_layer = 'a' * 999999999",
        "n_layer = 1 / 0",
        "n_layer = unknown",
    ],
)
def test_a_nanogpt_config_is_read_and_never_run(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"line 2: n_layer"):
        nanogpt.parse_config_file(Path(write(tmp_path / "c.py", f"# config\n{line}\n")))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "line",
    [
        "max_iters += 5",
        "max_iters, seed = 5, 6",
        "(max_iters := 5)",
        "if True: max_iters = 5",
        "for max_iters in [5]: pass",
        "mine *= 2",
        "del mine",
    ],
)
def test_a_setting_in_a_statement_that_is_not_run_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(BadInput, match=r"line 2: .*, which sets (max_iters|mine)"):
        nanogpt.parse_config_file(Path(write(tmp_path / "c.py", f"mine = 1\n{line}\n")))


def test_a_setting_with_its_type_is_a_setting(tmp_path: Path) -> None:
    text = "max_iters: int = 5\ndef f():\n    seed = 6\nif True: wandb_log = True\n"
    values, notes = nanogpt.parse_config_file(Path(write(tmp_path / "c.py", text)))
    assert values == {"max_iters": 5} and len(notes) == 2


def test_statements_that_are_no_settings_are_named(tmp_path: Path) -> None:
    values, notes = nanogpt.parse_config_file(
        Path(write(tmp_path / "c.py", "'''doc'''\nimport time\nwandb_run_name = 'a' + str(time.time())\nseed = 5\n"))
    )
    assert values == {"wandb_run_name": None, "seed": 5}
    assert notes == ["c.py, line 2: skipped: import time"]


@given(st.text(max_size=300))
def test_any_text_as_a_nanogpt_config_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "c.py"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        values, _ = nanogpt.parse_config_file(path)
        nanogpt.merge_settings(values, {}, foreign=True)
    except BadInput:
        pass


@given(
    st.dictionaries(
        st.sampled_from(sorted(schema.Config.model_fields)),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    )
)
def test_any_values_are_accepted_or_refused_whole(values: dict[str, object]) -> None:
    try:
        loaded = validation.validate(values, "test")
    except BadInput:
        return
    micro_batch_size = 1 if loaded.micro_batch_size == "auto" else loaded.micro_batch_size
    assert loaded.tokens_per_step % (micro_batch_size * loaded.block_size) == 0


def aliases(depth: int) -> str:
    """2 · 9^depth values in a few lines."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth + 1)]
    return "\n".join([*lines, "dataset: x", f"seed: *a{depth}"])


def test_a_long_value_is_shown_short_and_one_without_end_is_not_made(tmp_path: Path) -> None:
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
def test_numbers_and_notations_of_no_use_are_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(BadInput) as raised:
        loader.load_config(write(tmp_path / "c.yaml", text), {})
    assert part in str(raised.value)


@pytest.mark.parametrize(
    "number", ["010", "1:30", "1:30.5", "-0_7", "1__0", "10_", "_10", "1_0_", "'1__0'", "١٢", "1e٣", "'1.5'", "true"]
)
@pytest.mark.parametrize("key", ["max_steps", "micro_batch_size", "save_minutes"])
def test_a_number_that_may_be_read_as_another_is_refused(tmp_path: Path, key: str, number: str) -> None:
    if (key, number) == ("save_minutes", "'1.5'"):
        return
    with pytest.raises(BadInput):
        loader.load_config(write(tmp_path / "c.yaml", f"dataset: x\n{key}: {number}\n"), {})


@pytest.mark.parametrize("number", ["10", "+10", "1_0", "1e1", "1.0E+1", "10.0", "0xa", "' 10 '"])
@pytest.mark.parametrize("key", ["max_steps", "eval_interval", "micro_batch_size"])
def test_a_whole_number_may_be_written_as_people_do(tmp_path: Path, key: str, number: str) -> None:
    text = f"dataset: x\ntokens_per_step: 10_240\n{key}: {number}\n"
    assert getattr(loader.load_config(write(tmp_path / "c.yaml", text), {})[0], key) == 10


@pytest.mark.parametrize("steps", ["'١'", "True", "'1__0'", "None", "0", "1.5"])
def test_nanogpts_accumulation_is_a_whole_number(tmp_path: Path, steps: str) -> None:
    path = write(tmp_path / "c.py", f"batch_size = 2\ngradient_accumulation_steps = {steps}\n")
    if steps == "None":
        assert loader.load_config(path, {})[0].tokens_per_step == 65_536
        return
    with pytest.raises(BadInput, match="gradient_accumulation_steps"):
        loader.load_config(path, {})


@pytest.mark.parametrize("key", ["out_dir", "data_dir"])
def test_nothing_is_called_none(tmp_path: Path, key: str) -> None:
    with pytest.raises(BadInput, match="found None"):
        loader.load_config(write(tmp_path / "c.py", f"{key} = None\n"), {})


def test_a_size_beside_weights_of_another_is_refused() -> None:
    with pytest.raises(BadInput, match="--model gpt2-xl with init_from gpt2-medium"):
        loader.load_config("finetune", {"dataset": "x", "model": "gpt2-xl"})
    same = {"dataset": "x", "model": "gpt2-medium"}
    assert loader.load_config("finetune", {**same, "model": "gpt2", "init_from": "./mine"})[0].init_from == "./mine"
    assert loader.load_config("finetune", same)[0] == loader.load_config("finetune", {"dataset": "x"})[0]


def test_a_nanogpt_config_with_a_number_of_no_use_is_refused(tmp_path: Path) -> None:
    for line in ("batch_size = 0x" + "f" * 5000, "print(0x" + "f" * 5000 + ")", "wandb_log = 0x" + "f" * 5000):
        with pytest.raises(BadInput, match="20,000 bits"):
            loader.load_config(write(tmp_path / "c.py", line), {})
