"""Loss spikes: steps with windows of noise in a text that a small network soon predicts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2box.checkpoint.metadata import parse_state
from gpt2box.data import dataloader
from gpt2box.data.dataloader import TrainWindows
from gpt2box.data.downloads import sha256_of
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.data.prepare_texts import prepare_texts
from gpt2box.data.sources import load_texts
from gpt2box.errors import BadInput
from gpt2box.model.gpt2 import GPT2
from gpt2box.optim import loss_spikes
from gpt2box.optim.loss_spikes import HISTORY, MAX_CONSECUTIVE_BAD_STEPS, BadStepCounter
from gpt2box.runs import metrics
from gpt2box.runs.listing import find_run
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from gpt2box.verify.verify import verify
from tests.helpers.poisoned_data import poison_data
from tests.helpers.settings import TINY, TINYSHAKESPEARE
from tests.helpers.torchrun import train_on_two

STEADY = {
    **TINY, "dataset": "letters", "learning_rate": 1e-2, "lr_schedule": "constant", "warmup_steps": 0,
    "max_steps": 170, "save_interval": 40, "eval_interval": 80, "log_interval": 1,
}  # fmt: skip
NOISY_STEP = 160  # number of steps before the first one with noise
IN_BACKWARD = {"optimizer_in_backward": True}


def train(name: str = "run", allow: tuple[str, ...] = (), **changes: object) -> None:
    torch.set_num_threads(1)
    settings = {key: str(value) for key, value in {**STEADY, "name": name, **changes}.items()}
    run_job(None, settings, StopRequest(), allow)


def prepare_letters(volumes: Path, noisy: range) -> None:
    """Prepare a dataset `letters` of the repeated alphabet, with random letters in the data of the steps `noisy`."""
    folder = volumes / "data" / "letters"
    (volumes / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz\n" * 4000)
    prepare_texts(load_texts([str(volumes / "letters.txt")]), PrepareConfig("char", 0.1), folder)
    ids = np.fromfile(folder / "train.bin", dtype="<u2")
    windows, rng = TrainWindows(len(ids), 32, 1337), np.random.default_rng(0)
    for sequence in range(noisy.start * 8, noisy.stop * 8):
        begin = windows.start(sequence)
        ids[begin : begin + 33] = rng.integers(0, 27, 33)
    ids.tofile(folder / "train.bin")
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["train"]["sha256"] = sha256_of(folder / "train.bin")
    (folder / "dataset.json").write_text(json.dumps(manifest))


def weight_hashes(volumes: Path, name: str, step: int | None = None) -> list[str]:
    folder = volumes / "runs" / name / "checkpoints" / (f"step-{step:08d}" if step else "last")
    return [sha256_of(folder / file) for file in ("model.safetensors", "optimizer.safetensors")]


def last_row(volumes: Path, name: str = "run") -> dict[str, float]:
    return [row for row in metrics.read_rows(volumes / "runs" / name / "metrics.jsonl") if row["kind"] == "train"][-1]


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}, {**IN_BACKWARD, "micro_batch_size": 8}])
def test_a_spike_changes_neither_weights_nor_optimizer_state_even_right_after_a_resume(
    volumes: Path, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_letters(volumes, range(NOISY_STEP, NOISY_STEP + 1))
    train(**settings, max_steps=NOISY_STEP)
    before = last_row(volumes)
    train(**settings, max_steps=NOISY_STEP + 1)  # knows earlier losses only from the checkpoint
    row = last_row(volumes)
    assert row["loss"] > before["loss"] + 2 and (row["skipped_steps"], row["loss_spikes"]) == (1, 1)
    assert (
        weight_hashes(volumes, "run", NOISY_STEP + 1) == weight_hashes(volumes, "run", NOISY_STEP)
        and row["digest"] == before["digest"]
    )
    assert "left  1 step left out: loss far above the steps before\n" in capsys.readouterr().err
    train(**settings, max_steps=NOISY_STEP + 2)
    assert last_row(volumes)["digest"] != before["digest"] and last_row(volumes)["skipped_steps"] == 0
    train("off", **settings, max_steps=NOISY_STEP + 1, spike_sigma=0)
    assert weight_hashes(volumes, "off", NOISY_STEP) == weight_hashes(volumes, "run", NOISY_STEP) and weight_hashes(
        volumes, "off"
    ) != weight_hashes(volumes, "run", NOISY_STEP)
    assert last_row(volumes, "off")["skipped_steps"] == 0
    assert not parse_state(volumes / "runs/off/checkpoints/last")[0].recent_losses


def test_the_step_inside_the_backward_pass_skips_the_gradients_of_a_noisy_micro_step(volumes: Path) -> None:
    prepare_letters(volumes, range(NOISY_STEP, NOISY_STEP + 1))
    train(**IN_BACKWARD, max_steps=NOISY_STEP + 1)  # with 2 micro-steps
    assert (last_row(volumes)["skipped_steps"], last_row(volumes)["loss_spikes"]) == (1, 1)
    train("off", **IN_BACKWARD, max_steps=NOISY_STEP + 1, spike_sigma=0)
    moved = [last_step_distance(volumes, name) for name in ("run", "off")]
    assert 0 < moved[0] < moved[1] / 3  # moved only by the existing moments


def test_a_micro_step_with_most_of_a_steps_targets_is_no_spike(volumes: Path, tmp_path: Path) -> None:
    prompt, long = "Say it: " + "yes or no or " * 9, "yes it is so and so it is " * 12
    records = [{"prompt": f"{i} {prompt}", "response": long if i % 25 == 0 else "yes"} for i in range(600)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare([str(tmp_path / "chat.jsonl")], PrepareConfig(), folder=volumes / "data" / "chat")
    train(**IN_BACKWARD, dataset="chat", micro_batch_size=1, max_steps=HISTORY + 20, learning_rate=1e-6)
    assert last_row(volumes)["skipped_steps"] == 0


def last_step_distance(volumes: Path, name: str) -> float:
    """Return how far the last step moved the weights."""
    from safetensors.torch import load_file

    before, after = (
        load_file(volumes / "runs" / name / f"checkpoints/step-{step:08d}/model.safetensors")
        for step in (NOISY_STEP, NOISY_STEP + 1)
    )
    return sum(float((after[key] - before[key]).square().sum()) for key in before) ** 0.5


def test_five_consecutive_spikes_cause_a_rollback_and_an_interrupted_run_ends_bit_identical(
    volumes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_letters(volumes, range(NOISY_STEP + 4, NOISY_STEP + 12))
    train("straight")
    said = capsys.readouterr().err
    assert (
        f"step {NOISY_STEP + 9}: loss far above the steps before, 5 steps in a row (none reached the weights)" in said
    )
    assert f"step-{NOISY_STEP:08d}, passing over the data of 9 steps" in said
    state = parse_state(volumes / "runs/straight/checkpoints/last")[0]
    assert [(back.step, back.left_out) for back in state.rollbacks] == [(NOISY_STEP, 9)] and state.step == 170
    assert len(state.recent_losses) == HISTORY and state.bad_steps == 0
    for stop in (100, NOISY_STEP + 3, NOISY_STEP + 7, 165):  # short history; before, between and after the spikes
        train("halted", max_steps=stop)
    train("halted")
    assert weight_hashes(volumes, "halted") == weight_hashes(volumes, "straight")
    halted = parse_state(volumes / "runs/halted/checkpoints/last")[0]
    assert (halted.recent_losses, halted.rollbacks) == (state.recent_losses, state.rollbacks)


def test_verify_repeats_a_step_with_a_spike(volumes: Path) -> None:
    prepare_letters(volumes, range(NOISY_STEP + 4, NOISY_STEP + 5))
    train()
    verdict = verify(find_run("run"), f"step-{NOISY_STEP:08d}", 10)
    assert verdict.same and verdict.same_up_to == 170 and last_row(volumes)["loss_spikes"] == 1


def test_spikes_and_non_finite_steps_count_together(
    volumes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_letters(volumes, range(NOISY_STEP, NOISY_STEP + 8))
    for where, name in ((dataloader.TrainWindows, "start"), (dataloader, "read_windows"), (GPT2, "forward")):
        monkeypatch.setattr(where, name, getattr(where, name))  # restored after the test
    poison_data(NOISY_STEP + 2, NOISY_STEP + 7)
    train()
    said = capsys.readouterr().err
    assert f"step {NOISY_STEP + 5}: loss not finite or far above the steps before, 5 steps in a row" in said
    assert f"step-{NOISY_STEP:08d}, passing over the data of 5 steps" in said


def test_a_run_whose_loss_stays_high_stops_and_names_the_setting_that_allows_it(volumes: Path) -> None:
    prepare_letters(volumes, range(NOISY_STEP, NOISY_STEP + 100))
    with pytest.raises(
        BadInput, match=r"far above the steps before, 5 steps in a row.*also after 3 returns .*0150"
    ) as raised:
        train(max_steps=220, save_interval=10)
    assert "near those before" in str(raised.value) and "--spike-sigma 0 --allow-change spike-sigma" in str(
        raised.value
    )
    train(max_steps=220, save_interval=10, spike_sigma=0, allow=("spike_sigma",))
    assert last_row(volumes)["step"] == 220


def test_two_ranks_skip_the_same_steps(volumes: Path) -> None:
    prepare_letters(volumes, range(NOISY_STEP + 4, NOISY_STEP + 5))
    train("straight")
    train("run", max_steps=NOISY_STEP)
    said = (running := train_on_two("run", **STEADY)).communicate()[1]
    assert running.returncode == 0 and "2 ranks" in said, said
    assert last_row(volumes)["loss_spikes"] == 1
    assert last_row(volumes)["loss"] == pytest.approx(last_row(volumes, "straight")["loss"], abs=1e-4)


def test_a_changed_setting_clears_the_loss_history(volumes: Path) -> None:
    prepare_letters(volumes, range(0))
    train(max_steps=NOISY_STEP)
    state = volumes / "runs/run/checkpoints" / f"step-{NOISY_STEP:08d}"
    assert len(parse_state(state)[0].recent_losses) == HISTORY
    train(dropout=0.5, allow=("dropout",))
    assert not parse_state(state)[0].recent_losses and (state.parent / "last").resolve().name == "step-00000170"
    assert len(parse_state(state.parent / "last")[0].recent_losses) == 10


def random_digits(rng: random.Random) -> str:
    """Return 300 digits, which the rest of the text does not contain."""
    return "".join(rng.choices("0123456789", k=300))


def test_unusual_passages_in_a_healthy_run_are_no_spikes(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, text = random.Random(0), TINYSHAKESPEARE.read_text()[:300_000]
    parts = [text[i : i + 1500] + random_digits(rng) * (i % 45_000 == 0) for i in range(0, len(text), 1500)]
    (volumes / "odd.txt").write_text("".join(parts))
    prepare_texts(load_texts([str(volumes / "odd.txt")]), PrepareConfig("char", 0.1), volumes / "data" / "odd")
    settings = {"dataset": "odd", "micro_batch_size": 4, "tokens_per_step": 128, "max_steps": 600, "eval_interval": 600}
    train("kept", **settings)
    assert last_row(volumes, "kept")["skipped_steps"] == 0
    for bound in ("MIN_SEQUENCE_DEVIATION", "MAX_SEQUENCE_RISE"):  # without these bounds they are
        monkeypatch.setattr(loss_spikes, bound, 0.0)
    train("left", **settings)
    assert last_row(volumes, "left")["loss_spikes"] > 0


def record_losses(losses: list[float], counter: BadStepCounter) -> list[bool]:
    """Record steps with these losses; returns which are bad."""
    verdicts = []
    for loss in losses:
        value = torch.tensor(loss)
        limit, finite = counter.spike_limit(), value.isfinite()
        bad = (~finite | (value > limit)).float()
        counter.record(value, limit, bad, finite)
        verdicts.append(bool(bad))
    return verdicts


def test_a_spike_is_a_loss_far_above_the_history() -> None:
    rng = random.Random(0)
    usual = [rng.gauss(3, 0.1) for _ in range(HISTORY)]
    cpu = torch.device("cpu")

    def verdicts_after(losses: list[float], then: list[float], sequences: int = 10_000) -> list[bool]:
        counter = BadStepCounter(cpu, 6.0, sequences, losses=losses)
        resumed = BadStepCounter(cpu, 6.0, sequences, losses=counter.recent_losses)  # as state.json has them
        verdicts = record_losses(then, counter)
        assert record_losses(then, resumed) == verdicts and resumed.recent_losses == counter.recent_losses
        return verdicts

    assert verdicts_after(usual, [3.9, 3.5, torch.nan, 3.9, 0.0]) == [True, False, True, True, False]
    assert verdicts_after(usual[1:], [50.0]) == [False]  # the history is too short
    assert verdicts_after(usual, [3.9], sequences=16) == [False] and verdicts_after(usual, [4.6], sequences=16) == [
        True
    ]
    assert verdicts_after([0.01] * HISTORY, [0.06, 0.08]) == [False, True]
    assert (
        verdicts_after(usual, [5.0] * MAX_CONSECUTIVE_BAD_STEPS) == [True] * MAX_CONSECUTIVE_BAD_STEPS
    )  # the loss rose for good
    hard = [rng.random() < 0.06 for _ in range(4000)]
    verdicts = verdicts_after([3.0] * HISTORY, [4.0 if each else 3.0 for each in hard])
    assert 0 < sum(verdicts) < sum(hard) / 5  # the history adapts to them


@pytest.mark.parametrize(("sequences", "min_rise"), [(1, 12), (2, 6), (4, 3), (64, 0.75)])
def test_no_single_unusual_sequence_is_a_spike_on_a_memorized_dataset(sequences: int, min_rise: float) -> None:
    counter = BadStepCounter(torch.device("cpu"), 6.0, sequences, losses=[0.1] * HISTORY)
    assert float(counter.spike_limit()) == pytest.approx(0.1 + min_rise) and min_rise * sequences >= 12
    micro_steps = max(sequences // 2, 1)
    of_micro_step = BadStepCounter(torch.device("cpu"), 6.0, sequences // micro_steps, losses=[0.1] * HISTORY)
    assert float(counter.spike_limit(micro_steps)) == pytest.approx(float(of_micro_step.spike_limit()))
