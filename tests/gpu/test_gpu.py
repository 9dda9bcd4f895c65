"""On a GPU: planned memory against PyTorch's own count, running out of it, the same bits twice. `make test-gpu`.

A larger card is made one of 12 GB by a cap on this process. Not yet run on any card.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2box.errors import MachineCannot
from gpt2box.optim.clipped_step import make_optimizer_step
from gpt2box.optim.factory import make_optimizer
from gpt2box.planner.memory import GIB
from gpt2box.runs import metrics
from gpt2box.training.evaluate import autocast
from gpt2box.training.model_setup import compile_model, make_empty_model
from gpt2box.training.run import run_job
from gpt2box.utils.signals import StopRequest
from tests.helpers.commands import Command
from tests.helpers.gpu_runs import BITS
from tests.helpers.plans import planned, shape_of
from tests.helpers.settings import TINY, options

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LORA = {"init_from": "x", "lora_rank": 16, "weights_dtype": "bfloat16"}
LEAN = {"optimizer_states": "int8", "weights_dtype": "bfloat16", "optimizer_in_backward": "true"}


@pytest.fixture
def twelve_gib() -> Iterator[None]:
    """This process gets no more than a 12 GB card has."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(11.3 * GIB / total, 1.0))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    ("size", "micro_batch_size", "mode", "compiled", "settings"),
    [
        ("gpt2", 8, "none", False, {}),
        ("gpt2-medium", 4, "none", False, {}),
        ("gpt2-medium", 8, "selective", False, {}),
        ("gpt2-medium", 32, "full", False, {}),
        ("gpt2-medium", 4, "none", False, {"optimizer": "muon"}),
        ("gpt2-large", 4, "full", False, {"optimizer_states": "int8"}),
        ("gpt2-xl", 4, "full", False, LEAN),
        ("gpt2", 16, "none", True, {}),
        ("gpt2-medium", 4, "none", True, {}),
        ("gpt2-medium", 4, "none", True, {"dropout": 0.2}),
        ("gpt2-medium", 16, "full", True, {}),
        ("gpt2-medium", 4, "none", True, {"optimizer": "muon", "deterministic": True}),
        ("gpt2-large", 4, "full", True, {"optimizer_states": "int8"}),
        ("gpt2-xl", 1, "none", True, LORA),
    ],
)
def test_planned_memory_is_what_the_card_gives(
    size: str,
    micro_batch_size: int,
    mode: str,
    compiled: bool,
    settings: dict[str, object],
    twelve_gib: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, way = planned(shape_of(size), micro_batch_size, mode, "bfloat16", compiled=compiled, **settings)
    plan = plan.with_derived(device="cuda").with_execution(compile=compiled)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = make_empty_model(plan)
    model.init_weights(0)
    model.train()
    forward = compile_model(model) if compiled else model
    update = make_optimizer_step(make_optimizer(model, plan), plan)
    for step in range(2):
        loss = torch.zeros((), device="cuda")
        for micro_step in range(plan.execution.grad_accum_steps):
            batch = torch.randint(0, 50_257, (micro_batch_size, 1025), device="cuda")
            with autocast(plan):
                micro_loss = forward(batch[:, :-1], batch[:, 1:], 1.0 / plan.execution.grad_accum_steps)
            update.before_backward(step, micro_step, 1e-5, micro_loss)
            micro_loss.backward()
            loss += micro_loss.detach()
            del micro_loss
        update(loss)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with capsys.disabled():
        print(
            f"\n{size} {micro_batch_size} {mode}{' compiled' if compiled else ''} {settings}: planned ÷ measured "
            f"{way.memory.allocated / allocated:.3f} allocated ({allocated / GIB:.2f} GiB), "
            f"{way.memory.reserved / reserved:.3f} reserved ({reserved / GIB:.2f} GiB)"
        )
    assert 1.0 <= way.memory.reserved / reserved <= 1.2


def test_real_exhaustion_steps_down_and_ends_well(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**TINY, "name": "run", "device": "cuda", "n_embd": 512, "n_layer": 8, "n_head": 8, "block_size": 512}
    settings |= {"micro_batch_size": 64, "tokens_per_step": 64 * 512, "max_steps": 2, "compile": False}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5 * GIB / total)
    try:
        run_job(None, {key: str(value) for key, value in settings.items()}, StopRequest())
    except MachineCannot as error:
        pytest.fail(str(error))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory in step" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": "full"}, {"optimizer": "muon"}, LEAN])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_deterministic_runs_come_to_the_same_bits(
    volumes: Path, started: Command, compiled: str, settings: dict[str, object]
) -> None:
    if compiled == "true" and "optimizer_in_backward" in settings:
        pytest.skip("is never compiled")
    digests, files = [], []
    for name in ("one", "two"):  # processes of their own: cuBLAS reads its variable before its first product alone
        done = started("train", *options(name=name, compile=compiled, **{**BITS, **settings}))
        assert done.returncode == 0, done.stderr
        run = volumes / "runs" / name
        plan = json.loads((run / "plan.json").read_text())
        assert plan["deterministic"] is True and plan["compile"] is (compiled == "true")
        assert json.loads((run / "manifest.json").read_text())["sessions"][0]["environment"][
            "CUBLAS_WORKSPACE_CONFIG"
        ].startswith(":4096")
        rows = [row for row in metrics.read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
        assert [row["step"] for row in rows] == list(range(1, 11)) and rows[-1]["skipped_steps"] == 0
        digests.append([row["digest"] for row in rows])
        files.append(json.loads((run / "checkpoints/last/state.json").read_text())["digest"])
    assert digests[0] == digests[1] and len(set(digests[0])) == 10
    assert files[0] == files[1]
    verified = started("verify", "one")
    assert verified.returncode == 0, verified.stdout + verified.stderr
