"""Training through the command: exact resume, signals, damaged checkpoints, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2box.checkpoint import retention
from gpt2box.data.downloads import sha256_of
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.prepare_texts import prepare_texts
from gpt2box.data.sources import load_texts
from gpt2box.errors import BadInput, Damaged, Gpt2boxError
from gpt2box.runs import metrics
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.commands import Command
from tests.helpers.settings import TINY, options
from tests.helpers.training import process, train, wait_for

EXACT = {"max_steps": 60, "save_interval": 10, "dropout": 0.1, "name": "run", "log_interval": 1}


def digests(volumes: Path, step: int = 60) -> list[str]:
    folder = volumes / "runs" / "run" / "checkpoints" / retention.checkpoint_name(step)
    return [sha256_of(folder / name) for name in ("model.safetensors", "optimizer.safetensors")]


@pytest.fixture(scope="session")
def straight(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Digests of weights and averages after 60 steps without a stop."""
    import shutil

    volumes = tmp_path_factory.mktemp("straight") / "volumes"
    shutil.copytree(prepared, volumes)
    _, errors = (running := process(volumes, **EXACT)).communicate()
    assert running.returncode == 0, errors
    return digests(volumes)


@pytest.mark.parametrize("kill_at", [10, 30])
def test_a_killed_run_ends_in_the_same_bits(volumes: Path, straight: list[str], kill_at: int) -> None:
    running = process(volumes, **EXACT)
    wait_for(volumes / "runs/run/checkpoints" / retention.checkpoint_name(kill_at), running)
    running.kill()
    running.communicate()
    again = process(volumes, **EXACT)
    _, errors = again.communicate()
    assert again.returncode == 0 and "resuming from" in errors, errors
    assert digests(volumes) == straight
    steps = [row["step"] for row in metrics.read_rows(volumes / "runs/run/metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, 61))


@pytest.mark.parametrize(
    "settings",
    [
        {"weights_dtype": "bfloat16", "optimizer_states": "int8", "optimizer_in_backward": True},
        {"optimizer": "muon"},
        {"weights_dtype": "bfloat16", "optimizer_states": "int8", "optimizer": "muon"},
    ],
)
def test_a_killed_run_with_another_optimizer_ends_in_the_same_bits(volumes: Path, settings: dict[str, object]) -> None:
    lean = {**EXACT, **settings}
    straight = {**lean, "name": "straight"}
    _, errors = (running := process(volumes, **straight)).communicate()
    assert running.returncode == 0, errors
    running = process(volumes, **lean)
    wait_for(volumes / "runs/run/checkpoints" / retention.checkpoint_name(20), running)
    running.kill()
    running.communicate()
    _, errors = process(volumes, **lean).communicate()
    assert "resuming from" in errors, errors
    ends = [volumes / "runs" / name / "checkpoints/step-00000060" for name in ("run", "straight")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert sha256_of(ends[0] / name) == sha256_of(ends[1] / name)
    dtype = settings.get("weights_dtype", "float32")
    assert f'"torch_dtype": "{dtype}"' in (ends[0] / "config.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_between_intervals_and_the_same_command_goes_on(
    volumes: Path, straight: list[str], number: signal.Signals
) -> None:
    running = process(volumes, **EXACT)
    wait_for(volumes / "runs/run/checkpoints" / retention.checkpoint_name(10), running)
    time.sleep(0.02)
    running.send_signal(number)
    _, errors = running.communicate()
    assert running.returncode == 0 and f"stopped by {number.name} at step" in errors and "to go on" in errors, errors
    assert int(errors.split(" at step ")[1].split(" ")[0]) < 60
    again = process(volumes, **EXACT)
    again.communicate()
    assert again.returncode == 0 and digests(volumes) == straight


@pytest.mark.parametrize(
    "damage", ["truncated weights", "flipped byte", "no state", "broken state", "missing tokenizer"]
)
def test_a_damaged_checkpoint_is_passed_over(volumes: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    train(max_steps=20, save_interval=5)
    folder = volumes / "runs/run/checkpoints" / retention.checkpoint_name(20)
    expected = digests(volumes, 20)
    if damage == "truncated weights":
        os.truncate(folder / "model.safetensors", 1000)
    elif damage == "flipped byte":
        content = bytearray((folder / "optimizer.safetensors").read_bytes())
        content[-9] ^= 1
        (folder / "optimizer.safetensors").write_bytes(content)
    elif damage == "no state":
        (folder / "state.json").unlink()
    elif damage == "broken state":
        (folder / "state.json").write_text('{"format": 1, "step": 20}')
    else:
        (folder / "tokenizer.json").unlink()
    capsys.readouterr()
    train(max_steps=20, save_interval=5)
    said = capsys.readouterr().err
    assert "passed over a damaged checkpoint" in said and "at step 15" in said
    assert digests(volumes, 20) == expected


def test_after_a_damaged_checkpoint_pruning_keeps_the_whole_ones(volumes: Path) -> None:
    train(max_steps=20, save_interval=5, eval_interval=20)
    folder = volumes / "runs/run/checkpoints"
    os.truncate(folder / retention.checkpoint_name(20) / "model.safetensors", 1000)
    os.truncate(folder / retention.checkpoint_name(15) / "model.safetensors", 1000)
    running = process(volumes, **{**TINY, "name": "run", "save_interval": 1, "eval_interval": 20, "keep_last": 1})
    wait_for(folder / retention.checkpoint_name(12), running)
    running.kill()
    running.communicate()
    _, state, _ = retention.find_newest_checkpoint(folder)  # type: ignore[misc]
    assert 12 <= state.step < 20 and (folder / "last" / "state.json").exists()
    train(max_steps=20, save_interval=1, eval_interval=20, keep_last=1)
    assert {path.name for path in folder.glob("step-*")} == {
        retention.checkpoint_name(19),
        retention.checkpoint_name(20),
    }
    assert (folder / "best").resolve().name == retention.checkpoint_name(20)


@pytest.mark.parametrize("moment", ["between the renames of a second save", "before the links"])
def test_a_kill_inside_a_save_loses_nothing(volumes: Path, moment: str) -> None:
    train(max_steps=20)
    folder = volumes / "runs/run/checkpoints"
    if moment == "before the links":
        for name in ("best", "last"):
            retention.set_link(folder, name, 10)
    else:
        (folder / retention.checkpoint_name(20)).rename(folder / f".{retention.checkpoint_name(20)}.old")
        (folder / f".{retention.checkpoint_name(20)}.tmp").mkdir()
    train(max_steps=20)
    assert os.readlink(folder / "last") == os.readlink(folder / "best") == retention.checkpoint_name(20)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last", "step-00000010", "step-00000020"]


def test_a_file_that_may_not_be_so_large_keeps_the_checkpoint_before(volumes: Path) -> None:
    train(max_steps=10)
    before = digests(volumes, 10)
    code = (
        "import resource, sys; from gpt2box.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"sys.argv = ['gpt2box', 'train', *{options(name='run', max_steps=20)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 78 and "cannot save" in done.stderr and "files of up to 334" in done.stderr, done.stderr
    assert digests(volumes, 10) == before
    assert not list((volumes / "runs/run/checkpoints").glob(".step*"))
    train(max_steps=20)


def test_a_stop_in_the_last_step_still_gets_its_evaluation(volumes: Path) -> None:
    train(max_steps=20)
    folder = volumes / "runs/run/checkpoints" / retention.checkpoint_name(20)
    state = json.loads((folder / "state.json").read_text())
    best = state["best_val_loss"]
    state |= {"evaluated_step": 10, "best_val_loss": 9.0, "best_step": 10}  # as a signal there leaves it
    (folder / "state.json").write_text(json.dumps(state))
    train(max_steps=20)
    assert json.loads((folder / "state.json").read_text())["best_val_loss"] == pytest.approx(best, abs=1e-6)


def test_with_nothing_whole_it_stops_and_removes_nothing(volumes: Path) -> None:
    train(max_steps=20)
    folder = volumes / "runs/run/checkpoints"
    for path in folder.glob("step-*/model.safetensors"):
        os.truncate(path, 1000)
    before = sorted(folder.rglob("*"))
    with pytest.raises(Gpt2boxError, match="no intact checkpoint") as raised:
        train(max_steps=20)
    assert raised.value.exit_code == 4 and sorted(folder.rglob("*")) == before


def test_the_micro_batch_size_does_not_change_the_training(volumes: Path) -> None:
    losses = []
    for size in (1, 2, 8):
        train(f"size{size}", micro_batch_size=size, log_interval=1)
        rows = metrics.read_rows(volumes / f"runs/size{size}/metrics.jsonl")
        losses.append(torch.tensor([row["loss"] for row in rows if row["kind"] == "train"]))
    assert (losses[0] - losses[1]).abs().max() < 1e-5 and (losses[0] - losses[2]).abs().max() < 1e-5
    assert losses[0][-1] < losses[0][0] - 0.1


def test_a_finished_run_says_so_and_more_steps_go_on(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    written = (volumes / "runs/run/checkpoints/last/state.json").stat().st_mtime_ns
    capsys.readouterr()
    train()
    said = capsys.readouterr().err
    assert "finished at step 20 before" in said and "--max-steps 40" in said and "report.html" not in said
    assert (volumes / "runs/run/checkpoints/last/state.json").stat().st_mtime_ns == written
    train(max_steps=30)
    said = capsys.readouterr().err
    assert "max_steps: 20 before, 30 now" in said and "finished at step 30" in said


def test_other_settings_on_resume_are_refused_with_the_difference(volumes: Path) -> None:
    train()
    with pytest.raises(BadInput) as raised:
        train(learning_rate="5e-4", n_layer=3)
    assert "learning_rate: 0.001 before, 0.0005 now" in str(raised.value) and "n_layer: 2 before, 3 now" in str(
        raised.value
    )


def test_another_text_under_the_same_name_is_refused_on_resume(volumes: Path) -> None:
    train(max_steps=10)
    path = volumes / "data/text/dataset.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="not the one that the run run began with"):
        train(max_steps=20)


def test_another_text_of_the_same_length_is_refused_also_of_nanogpts_dataset(volumes: Path) -> None:
    folder = volumes / "data" / "nanogpt"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes((volumes / "data/bpe" / name).read_bytes())
    settings = {"dataset": "nanogpt", "tokens_per_step": 128, "eval_interval": 100}
    train(max_steps=2, **settings)
    path = volumes / "runs/run/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["dataset"]["splits"]["train"].pop("sha256") == sha256_of(folder / "train.bin")
    path.write_text(json.dumps(manifest))  # as an earlier version wrote it
    train(max_steps=3, **settings)
    os.utime(folder / "train.bin")
    train(max_steps=4, **settings)
    content = bytearray((folder / "train.bin").read_bytes())
    content[100:102] = content[102:104]
    content[0] ^= 1
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(BadInput, match="not the one that the run run began with"):
        train(max_steps=5, **settings)


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew(volumes: Path) -> None:
    settings = {"name": "run", "max_steps": 100_000, "log_interval": 1, "eval_interval": 100_000}
    running = process(volumes, **settings, save_interval=100_000)
    wait_for(volumes / "runs/run/metrics.jsonl", running)
    while not metrics.read_rows(volumes / "runs/run/metrics.jsonl")[-1:]:
        time.sleep(0.005)
    running.kill()
    running.communicate()
    _, errors = (again := process(volumes, **{**settings, "max_steps": 3})).communicate()
    assert again.returncode == 0 and "gone" not in errors and "note: " not in errors, errors


def test_best_and_last_are_kept_and_older_ones_go(volumes: Path) -> None:
    train(max_steps=60, eval_interval=10, keep_last=2)
    folder = volumes / "runs/run/checkpoints"
    state = json.loads((folder / "last/state.json").read_text())
    assert state["step"] == 60
    assert os.readlink(folder / "best") == retention.checkpoint_name(state["best_step"])
    there = {path.name for path in folder.glob("step-*")}
    assert there == {retention.checkpoint_name(step) for step in (50, 60, state["best_step"])}
    assert (volumes / "runs/run/loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("config.yaml", "plan.json", "manifest.json"):
        assert (volumes / "runs/run" / name).stat().st_size > 100


def test_it_stops_when_validation_gets_no_better(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "learning_rate": 0.3,
        "min_lr": 0.3,
        "warmup_steps": 0,
        "max_steps": 500,
        "eval_interval": 5,
        "patience": 3,
    }
    train(**changes)
    assert "stopped early, no better val_loss" in capsys.readouterr().err
    state = json.loads((volumes / "runs/run/checkpoints/last/state.json").read_text())
    assert state["step"] == max(state["best_step"], 0) + 15 < 500
    train(**changes)
    assert f"stopped early, no better val_loss at step {state['step']}" in capsys.readouterr().err


def test_one_text_is_learned_by_heart(volumes: Path) -> None:
    train(max_steps=400, tokens_per_step=128, learning_rate=3e-3, n_embd=64, eval_interval=400)
    rows = metrics.read_rows(volumes / "runs/run/metrics.jsonl")
    assert rows[1]["loss"] > 4 and rows[-2]["loss"] < 2.6


def test_weights_that_give_nan_never_train_and_it_says_what_to_try(volumes: Path) -> None:
    train(max_steps=10)
    folder = volumes / "models" / "broken"
    folder.parent.mkdir(exist_ok=True)
    (volumes / "runs/run/checkpoints").joinpath(retention.checkpoint_name(10)).rename(folder)
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.mlp.c_fc.bias"][0] = torch.inf
    save_file(state, folder / "model.safetensors")
    with pytest.raises(Damaged, match=r"model.safetensors has 116,872 bytes") as damaged:
        train("next", init_from="broken", max_steps=100, eval_interval=100)
    assert "rm " in damaged.value.next_step
    (folder / "state.json").unlink()
    with pytest.raises(Damaged, match=r"h\.0\.mlp\.c_fc\.bias has numbers that are not finite"):
        train("next", init_from="broken")
    state["transformer.h.0.mlp.c_fc.bias"][0] = 1e30  # whose square is more than a float holds
    save_file(state, folder / "model.safetensors")
    before = sha256_of(folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"not finite, 5 steps in a row.*none reached the weights") as raised:
        train("next", init_from="broken", max_steps=100, eval_interval=100)
    assert "--learning-rate 0.0005" in str(raised.value)
    assert not (volumes / "runs/next/checkpoints").exists() and sha256_of(folder / "model.safetensors") == before


def test_training_goes_on_from_a_hugging_face_folder(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64)).save_pretrained(
        volumes / "models/gpt2-medium"
    )
    flags = {
        "init_from": "gpt2-medium",
        "data_dir": str(volumes / "data/bpe"),
        "max_iters": "4",
        "learning_rate": "3e-3",
    }
    flags |= {"batch_size": "2", "block_size": "32", "tokens_per_step": "128", "eval_iters": "4", "device": "cpu"}
    run_job(None, flags, StopRequest())
    assert "gpt2-medium-bpe: finished at step 4" in capsys.readouterr().err
    rows = [row for row in metrics.read_rows(volumes / "runs/gpt2-medium-bpe/metrics.jsonl") if row["kind"] == "eval"]
    assert rows[0]["step"] == 0 and rows[-1]["val_loss"] < rows[0]["val_loss"]
    flags |= {"block_size": "128", "tokens_per_step": "256", "data_dir": str(volumes / "data/text"), "name": "other"}
    with pytest.raises(BadInput) as raised:
        run_job(None, flags, StopRequest())
    assert not (volumes / "runs/other").exists()
    assert "the weights allow at most 64" in str(raised.value) and "a vocabulary of 65 tokens" in str(raised.value)


@pytest.mark.parametrize("way", ["selective", "full"])
def test_recomputing_and_bfloat16_train(volumes: Path, way: str) -> None:
    train(activation_checkpointing=way, dtype="bfloat16", loss_chunk_tokens=50)
    rows = metrics.read_rows(volumes / "runs/run/metrics.jsonl")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1


@pytest.mark.parametrize("config", ["finetune", "finetune-large", "finetune-xl", "finetune-lora"])
def test_the_finetune_configs_run_end_to_end(volumes: Path, config: str, gpt2box: Command) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=50_257)
    GPT2LMHeadModel(shape).save_pretrained(volumes / "models" / "small")
    cpu = ["--device=cpu", "--block-size=32", "--tokens-per-step=256", "--max-steps=4", "--eval-interval=2"]
    done = gpt2box("train", config, "--dataset=bpe", "--init-from=small", "--eval-windows=4", *cpu)
    assert done.returncode == 0 and "finished at step 4" in done.stderr, done.stderr
    best = volumes / "runs" / f"{config}-bpe" / "checkpoints" / "best"
    model = GPT2LMHeadModel.from_pretrained(best, torch_dtype="auto")
    assert model.dtype == (torch.bfloat16 if config == "finetune-xl" else torch.float32)
    again = gpt2box("sample", f"{config}-bpe", "--max-new-tokens", "5")
    assert again.returncode == 0 and again.stdout.strip()


def test_two_trainers_on_one_run_are_refused(volumes: Path) -> None:
    first = process(volumes, **{**EXACT, "max_steps": 100_000})
    try:
        wait_for(volumes / "runs/run/checkpoints/last", first)
        with pytest.raises(BadInput, match="being trained by another process"):
            train(**{**EXACT, "max_steps": 100_000})
    finally:
        first.kill()
        first.communicate()


def test_eval_only_trains_nothing(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    rows = metrics.read_rows(volumes / "runs/run/metrics.jsonl")
    capsys.readouterr()
    train(eval_only=True)
    assert "checkpoints/best" in capsys.readouterr().out
    train(eval_only=True)
    assert f"val_loss {min(r['val_loss'] for r in rows if r['kind'] == 'eval'):.4f}" in capsys.readouterr().out


def test_samples_are_written_at_each_evaluation(volumes: Path) -> None:
    train(sample_tokens=20, sample_prompt="ROMEO:")
    texts = [path.read_text() for path in sorted((volumes / "runs/run/samples").glob("step-*.txt"))]
    assert len(texts) == 3 and all(text.startswith("ROMEO:") and len(text) == 27 for text in texts)


def test_a_run_begins_from_the_best_weights_of_another(volumes: Path) -> None:
    train(max_steps=10)
    train("tuned", init_from="run", max_steps=0)
    began = json.loads((volumes / "runs/tuned/manifest.json").read_text())["weights"]
    best = (volumes / "runs/run/checkpoints/best").resolve()
    assert sha256_of(best / "model.safetensors") in json.dumps(began), began
    with pytest.raises(BadInput, match=r"no config\.json"):
        train("other", init_from="nothing")


def test_a_finetune_goes_on_without_its_first_weights(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(max_steps=10)
    first = volumes / "models" / "first"
    first.parent.mkdir()
    (volumes / "runs/run/checkpoints" / retention.checkpoint_name(10)).rename(first)
    tuned = {"init_from": "first", "n_layer": "2", "max_steps": 10}
    train("tuned", **tuned)
    train("tuned", **tuned, eval_only=True)
    assert "tuned/checkpoints/best" in capsys.readouterr().out
    first.rename(volumes / "models" / "gone")
    train("tuned", **{**tuned, "max_steps": 20})
    assert "tuned: finished at step 20" in capsys.readouterr().err


def test_a_text_without_line_ends_is_sampled(volumes: Path, tmp_path: Path) -> None:
    (tmp_path / "digits.txt").write_text("0123456789" * 500)
    corpus = replace(load_texts([str(tmp_path / "digits.txt")]), end_of_text=False)
    prepare_texts(corpus, PrepareConfig("char", 0.1), volumes / "data" / "digits")
    train("digits", dataset="digits", sample_tokens=10)
    assert len(list((volumes / "runs/digits/samples").glob("step-*.txt"))) == 3
    with pytest.raises(BadInput, match="not in this model's 10 characters: 'R'"):
        train("letters", dataset="digits", sample_tokens=10, sample_prompt="R")
    assert not (volumes / "runs/letters").exists()


def test_bad_usage_of_train_is_a_few_lines(volumes: Path, gpt2box) -> None:  # type: ignore[no-untyped-def]
    for arguments, code, part in [
        ([], 2, "one of: demo"),
        (["dmo"], 2, "did you mean demo?"),
        (["nothing.yaml"], 2, "no file nothing.yaml"),
        (options(dataset="nothing"), 2, "no dataset in"),
        (["--eval-only", "dmo"], 2, "did you mean demo?"),
        (options(device="cuda:7"), 3, "a GPU for device cuda:7"),
        (options(device="gpu"), 2, "device: found 'gpu'"),
        (options(block_size=200_000, tokens_per_step=800_000), 2, "block_size at most 111,539"),
        (options(dropout=3), 2, "dropout"),
        (["--no-such=1"], 2, "No such option"),
    ]:
        done = gpt2box("train", *arguments)
        assert done.returncode == code and part in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (volumes / "runs").exists()


def test_a_run_folder_that_cannot_be_written_is_exit_78(volumes: Path, gpt2box) -> None:  # type: ignore[no-untyped-def]
    (volumes / "runs").write_text("a file where a folder is expected")
    done = gpt2box("train", *options(name="run"))
    assert done.returncode == 78 and "GPT2BOX_VOLUMES" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_compiled_run_trains_like_an_eager_one(volumes: Path) -> None:
    train("eager")
    train("compiled", compile=True, dropout=0.0)
    eager, compiled = (
        [r["loss"] for r in metrics.read_rows(volumes / f"runs/{name}/metrics.jsonl") if r["kind"] == "train"]
        for name in ("eager", "compiled")
    )
    assert eager == pytest.approx(compiled, abs=1e-4)


def test_a_checkpoint_is_never_older_than_save_minutes(volumes: Path) -> None:
    train(max_steps=20, save_interval=1000, eval_interval=1000, save_minutes=1e-9)
    there = sorted(path.name for path in (volumes / "runs/run/checkpoints").glob("step-*"))
    assert there == [retention.checkpoint_name(step) for step in range(1, 21)]


def test_where_there_is_no_space_for_a_checkpoint_none_is_begun(volumes: Path, gpt2box: Command) -> None:
    runs = volumes / "runs"
    runs.mkdir()
    size = 2 * 2**20
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(runs)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system of its own needs root")
    try:
        command = ["train", *options(name="run", max_steps=10, eval_interval=10, save_interval=5, keep_last=100)]
        assert gpt2box(*command).returncode == 0
        used = sum(path.stat().st_size for path in runs.rglob("*") if path.is_file() and not path.is_symlink())
        (runs / "filler").write_bytes(bytes(size - used - 300_000))
        full = gpt2box(*command, "--max-steps=20")
        assert full.returncode == 78 and "cannot save" in full.stderr and "KiB free" in full.stderr, full.stderr
        assert not list((runs / "run/checkpoints").glob(".step-*"))
        (runs / "filler").unlink()
        again = gpt2box(*command, "--max-steps=20")
        assert again.returncode == 0 and "at step 10" in again.stderr, again.stderr
    finally:
        subprocess.run(["umount", str(runs)], check=True)
