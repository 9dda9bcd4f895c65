"""nanoGPT's config files and setting names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2box.config import loader, nanogpt, schema
from gpt2box.errors import BadInput

DOCS = Path(__file__).parents[2] / "docs" / "coming-from-nanogpt.md"

TWELVE_GIB = DOCS.read_text().split("```python\n")[1].split("```")[0]  # what users read is what is tested


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_12_gib_config_of_nanogpt_works_unchanged(tmp_path: Path) -> None:
    loaded, notes = loader.load_config(write(tmp_path / "medium12.py", TWELVE_GIB + "backend = 'nccl'\n"), {})
    assert loaded.shape() == {"n_layer": 24, "n_head": 16, "n_embd": 1024}
    assert (loaded.micro_batch_size, loaded.block_size, loaded.tokens_per_step) == (4, 512, 65_536)
    assert (loaded.learning_rate, loaded.min_lr, loaded.warmup_steps, loaded.decay_steps) == (3e-4, 3e-5, 2000, 100_000)
    assert (loaded.compile, loaded.dtype, loaded.bias, loaded.dataset) == (True, "bfloat16", False, "openwebtext")
    assert (loaded.eval_interval, loaded.eval_windows, loaded.log_interval) == (500, 400, 10)
    assert any("backend" in note for note in notes)


def test_every_setting_of_nanogpts_train_py_is_known() -> None:
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


def test_gradient_accumulation_without_a_batch_size_is_refused() -> None:
    with pytest.raises(BadInput, match="without a batch_size"):
        loader.load_config("shakespeare", {"gradient_accumulation_steps": "10"})
    assert loader.load_config("shakespeare", {"eval_iters": "10"})[0].eval_windows == 40


def test_nanogpts_flags_override_our_files() -> None:
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
def test_a_nanogpt_config_is_parsed_and_never_executed(
    tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_a_setting_inside_a_statement_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(BadInput, match=r"line 2: .*, which sets (max_iters|mine)"):
        nanogpt.parse_config_file(Path(write(tmp_path / "c.py", f"mine = 1\n{line}\n")))


def test_an_annotated_assignment_is_a_setting(tmp_path: Path) -> None:
    text = "max_iters: int = 5\ndef f():\n    seed = 6\nif True: wandb_log = True\n"
    values, notes = nanogpt.parse_config_file(Path(write(tmp_path / "c.py", text)))
    assert values == {"max_iters": 5} and len(notes) == 2


def test_skipped_statements_are_reported(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("steps", ["'١'", "True", "'1__0'", "None", "0", "1.5"])
def test_nanogpts_gradient_accumulation_is_a_whole_number(tmp_path: Path, steps: str) -> None:
    path = write(tmp_path / "c.py", f"batch_size = 2\ngradient_accumulation_steps = {steps}\n")
    if steps == "None":
        assert loader.load_config(path, {})[0].tokens_per_step == 65_536
        return
    with pytest.raises(BadInput, match="gradient_accumulation_steps"):
        loader.load_config(path, {})


def test_a_nanogpt_config_with_an_unusable_number_is_refused(tmp_path: Path) -> None:
    for line in ("batch_size = 0x" + "f" * 5000, "print(0x" + "f" * 5000 + ")", "wandb_log = 0x" + "f" * 5000):
        with pytest.raises(BadInput, match="20,000 bits"):
            loader.load_config(write(tmp_path / "c.py", line), {})
