"""Weights, gradients and optimizer state sharded over two ranks: real processes, connected over gloo."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from gpt2box.checkpoint import retention
from gpt2box.config.validation import validate
from gpt2box.data.prepare import prepare
from gpt2box.data.prepare_config import PrepareConfig
from gpt2box.errors import BadInput, MachineCannot
from gpt2box.model.shape import ModelShape
from gpt2box.planner.search import choose_execution_plan
from gpt2box.planner.search import list_execution_plans as ways
from gpt2box.planner.target_device import TargetDevice
from gpt2box.training.resolve import check_sharding_support
from tests.helpers.settings import ROOT, TINY, options
from tests.helpers.torchrun import LONG, SAME, assert_same, rank_of, rows, train_on_two, two_ranks
from tests.helpers.training import train, wait_for

needs_fsdp2 = pytest.mark.skipif(torch.__version__ < "2.6", reason="FSDP2 is not public before PyTorch 2.6")


@needs_fsdp2
@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.3, "grad_clip": 0.5, "activation_checkpointing": "full"},
        {"optimizer": "muon", "activation_checkpointing": "selective"},
        {"compile": True, "dataset": "text"},
    ],
)
def test_sharded_ranks_match_one_and_resume_its_checkpoints(
    volumes: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    records = [{"prompt": f"{i}" + " and what" * (i % 7), "response": " so it is" * (i % 5)} for i in range(1, 400)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare([str(tmp_path / "chat.jsonl")], PrepareConfig(), folder=volumes / "data" / "chat")
    # With 9 validation windows, one rank has one window fewer than the other.
    settings = {**SAME, "dataset": "chat", "eval_windows": 9, "micro_batch_size": 2, **settings}
    train("straight", **{**settings, "compile": False})
    train("run", **{**settings, "compile": False, "max_steps": 6})
    said = (running := train_on_two("run", **{**settings, "max_steps": 14, "shard": True})).communicate()[1]
    assert running.returncode == 0 and "each rank keeps a share" in said, said
    train("run", **{**settings, "compile": False})
    assert len(rows(volumes, "run", "loss")) == 20
    # A CPU sums the squares of a tensor in float32 one by one, so the half tensor of a rank rounds less.
    assert_same(volumes, "run", "straight", besides=(6, 14), norm=2e-4)


@needs_fsdp2
def test_interrupted_and_killed_runs_end_bit_identical(volumes: Path) -> None:
    settings = {**LONG, "max_steps": 80, "eval_interval": 40, "save_interval": 20, "shard": True}
    straight = train_on_two("straight", **settings)
    said = straight.communicate()[1]
    assert straight.returncode == 0, said
    checkpoints = volumes / "runs" / "run" / "checkpoints"
    running = train_on_two("run", restarts=1, **settings)
    wait_for(checkpoints / retention.checkpoint_name(20), running)
    os.kill(rank_of(running, 1), signal.SIGKILL)
    wait_for(checkpoints / retention.checkpoint_name(40), running)
    os.kill(rank_of(running, 0), signal.SIGTERM)
    said = running.communicate()[1]
    assert running.returncode == 0 and said.count("resuming from") == 1 and "to go on" in said, said
    assert (again := train_on_two("run", **settings)).communicate() and again.returncode == 0
    ends = [volumes / "runs" / name / "checkpoints" / retention.checkpoint_name(80) for name in ("straight", "run")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert not (ends[0].parent / retention.checkpoint_name(0)).exists()
    digests = [rows(volumes, name, "digest") for name in ("straight", "run")]
    assert len(digests[0]) == 80 and digests[0] == digests[1]


FAULTY_RANK_1 = """
import os
from gpt2box.cli.main import main
from tests.helpers.operator_faults import Refuse, Spoil

if os.environ["RANK"] == "0":
    main()
else:  # non-finite gradients in steps 11 to 15, then, after the rollback, out of memory
    with Spoil("gelu_backward", range(41, 61)), Refuse("gelu_backward", 90):
        main()
"""


@needs_fsdp2
def test_all_ranks_skip_the_bad_gradients_of_one_and_roll_back_together(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(FAULTY_RANK_1)
    settings = {**SAME, "n_layer": 2, "micro_batch_size": 2, "save_interval": 4, "eval_interval": 100, "shard": True}
    settings |= {"tokens_per_step": 2 * 2 * 32 * 2}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    running = two_ranks(str(tmp_path / "program.py"), "train", *options(name="run", **settings))
    said = running.communicate()[1]
    assert "back to" in said and "step-00000008, passing over the data of 7 steps" in said, said
    assert "error: rank 1: out of memory" in said and "exitcode  : 3" in said, said
    assert "--micro-batch-size 1 --activation-checkpointing full: goes on" in said
    found = retention.find_newest_checkpoint(volumes / "runs" / "run" / "checkpoints")
    assert found and 8 < found[1].step < 20 and found[1].rollbacks


NO_HOST_MEMORY = """
import torch
from gpt2box.cli.main import main
from gpt2box.model.gpt2 import GPT2

GPT2.init_weights = lambda *_: torch.empty(1 << 60, dtype=torch.uint8)
main()
"""


@needs_fsdp2
def test_too_little_host_memory_for_the_unsharded_network_is_reported(volumes: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(NO_HOST_MEMORY)
    running = two_ranks(str(tmp_path / "program.py"), "train", *options(name="run", **SAME, shard=True))
    said = running.communicate()[1]
    assert "own memory ran out while all weights and averages are made, to be dealt out" in said, said
    assert "exitcode  : 3" in said and "DefaultCPUAllocator" not in said, said


def test_settings_that_cannot_be_sharded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ({"weights_dtype": "bfloat16"}, {"lora_rank": 4, "init_from": "x"}):
        with pytest.raises(BadInput, match="shard: found"):
            validate({**TINY, "shard": True, **change}, "test")
    config = validate({**TINY, "shard": True, "optimizer_states": "int8"}, "test")
    shape = ModelShape(2, 2, 64, 32, 65)
    with pytest.raises(MachineCannot, match=r"shard true with PyTorch 2\.4\.1"), monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.4.1")
        check_sharding_support(config, shape, 2)
    if torch.__version__ >= "2.6":
        check_sharding_support(config, shape, 2)
        with pytest.raises(BadInput, match="optimizer_states int8 with 3 ranks"):
            check_sharding_support(config, shape, 3)


def test_gpt2_xl_fits_four_small_gpus_when_sharded() -> None:
    config = validate({"dataset": "any", "model": "gpt2-xl", "tokens_per_step": 262_144}, "test")
    shape = ModelShape(n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50_257, bias=True)
    place = TargetDevice("4 × RTX 4070", round(11.3 * 2**30), None, "bfloat16", on_gpu=True, compiled=False, ranks=4)
    with pytest.raises(MachineCannot) as refused:
        choose_execution_plan(ways(config, shape, place), config, shape, place)
    assert "--shard true fits" in refused.value.next_step
    shared = config.model_copy(update={"shard": True})
    assert choose_execution_plan(ways(shared, shape, place), shared, shape, place).memory.total < 11.3 * 2**30
