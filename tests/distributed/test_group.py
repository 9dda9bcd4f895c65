"""Runs of several ranks: real processes, started by torchrun, connected over gloo."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from gpt2box.checkpoint import retention
from gpt2box.config.validation import validate
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.errors import BadInput
from gpt2box.model.shape import ModelShape
from gpt2box.planner.search import list_execution_plans as ways
from gpt2box.planner.target_device import select_target_device
from tests.helpers.settings import ROOT, TINY, options
from tests.helpers.torchrun import LONG, SAME, assert_same, rank_of, rows, train_on_two, two_ranks
from tests.helpers.training import train, wait_for


def test_two_ranks_match_one_and_resume_each_others_checkpoints(volumes: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"{i}" + " and what" * (i % 7), "response": " so it is" * (i % 5)} for i in range(1, 400)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # Only responses count in the loss, and each micro-batch has another number of their tokens.
    prepare([str(tmp_path / "chat.jsonl")], PrepareConfig(), folder=volumes / "data" / "chat")
    settings = {**SAME, "dataset": "chat", "weight_decay": 0.3, "grad_clip": 0.5, "eval_windows": 9}
    train("straight", **settings)
    train("run", **{**settings, "max_steps": 8})
    said = (running := train_on_two("run", **{**settings, "max_steps": 14})).communicate()[1]
    assert running.returncode == 0 and "× 32 × 1 micro-step × 2 ranks" in said, said
    train("run", **settings)
    assert len(rows(volumes, "run", "loss")) == 20
    assert_same(volumes, "run", "straight", besides=(8, 14))


def test_a_killed_rank_restarts_and_a_signal_to_one_rank_stops_all(volumes: Path) -> None:
    train("straight", **LONG)
    checkpoints = volumes / "runs" / "run" / "checkpoints"
    running = train_on_two("run", restarts=1, **LONG)
    wait_for(checkpoints / retention.checkpoint_name(50), running)
    os.kill(rank_of(running, 1), signal.SIGKILL)
    wait_for(checkpoints / retention.checkpoint_name(200), running)
    os.kill(rank_of(running, 1), signal.SIGTERM)
    said = running.communicate()[1]
    assert running.returncode == 0 and said.count("resuming from") == 1 and said.count("to go on") == 1, said
    step = int(said.split("at step ")[-1].split(" ")[0])
    assert 200 <= step < 300 and (checkpoints / retention.checkpoint_name(step)).exists(), said
    train("run", **LONG)
    assert_same(volumes, "run", "straight")


FAULTY_RANK_1 = """
import os
from gpt2box.cli.main import main
from tests.helpers.operator_faults import Refuse, Spoil

if os.environ["RANK"] == "0":
    main()
else:  # out of memory in the rehearsal's backward pass, a non-finite gradient in step 2, out of memory again
    with Spoil("gelu_backward", range(8, 9)), Refuse("gelu_backward", 20), Refuse("gelu_backward", 2):
        main()
"""


def test_all_ranks_follow_the_faults_of_one_and_save_after_running_out_of_memory(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(FAULTY_RANK_1)
    settings = {**SAME, "micro_batch_size": "auto", "save_interval": 100, "eval_interval": 100}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    running = two_ranks(str(tmp_path / "program.py"), "train", *options(name="run", **settings))
    said = running.communicate()[1]
    assert "out of memory: going on with micro_batch_size" in said and "on all ranks" in said, said
    assert "error: rank 1: out of memory" in said and "exitcode  : 3" in said, said
    (session,) = json.loads((volumes / "runs/run/manifest.json").read_text())["sessions"]
    (way,) = session["ways"]
    assert way["step"] == 0 and way["micro_batch_size"] < session["way"]["micro_batch_size"]
    found = retention.find_newest_checkpoint(volumes / "runs" / "run" / "checkpoints")
    assert found and 2 < found[1].step < 20
    assert rows(volumes, "run", "loss")[1] is not None and rows(volumes, "run", "grad_norm")[2] is None
    assert max(rows(volumes, "run", "skipped_steps").values()) == 1


def test_a_step_that_ranks_cannot_share_is_refused_with_sizes_that_they_can() -> None:
    config = validate({**TINY, "tokens_per_step": 32 * 32}, "test")
    with pytest.raises(BadInput, match="tokens_per_step 1024 with 3 ranks") as refused:
        select_target_device("rtx-4070", None, config, gpus=3)
    assert "768 or 1152" in refused.value.expected
    for change in ({"optimizer_in_backward": True}, {"device": "cuda:1"}):
        with pytest.raises(BadInput, match="with 2 ranks"):
            select_target_device("rtx-4070", None, config.model_copy(update=change), gpus=2)


def test_compiled_ranks_match_one(volumes: Path) -> None:
    settings = {**SAME, "n_layer": 1, "max_steps": 4, "micro_batch_size": 2, "eval_interval": 100}
    train("one", **settings)
    said = (running := train_on_two("two", **settings, compile=True)).communicate()[1]
    assert running.returncode == 0, said
    assert rows(volumes, "one", "loss") == pytest.approx(rows(volumes, "two", "loss"), abs=1e-5)


def test_several_gpus_share_the_sequences_of_a_step_and_are_planned_to_be_faster() -> None:
    config = validate({"dataset": "any", "model": "gpt2-medium", "tokens_per_step": 262_144}, "test")
    shape = ModelShape(n_layer=24, n_head=16, n_embd=1024, block_size=1024, vocab_size=50_257, bias=True)
    one, four = (ways(config, shape, select_target_device("rtx-4090", None, config, gpus)) for gpus in (1, 4))
    assert all(way.micro_batch_size * way.grad_accum_steps * way.ranks == 256 for way in [*one, *four])
    assert 2.5 < four[0].tokens_per_sec / one[0].tokens_per_sec < 4
