"""On a GPU, the commands as a user gives them: checks, training, stopping and going on, sampling, a card that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2box.data.pretrained import load_shape
from gpt2box.model.decoder import Decoder
from gpt2box.model.gpt2 import GPT2
from gpt2box.model.hf_weights import load_hf_weights
from gpt2box.model.sampling import SamplingParams, generate
from gpt2box.planner.bench_records import read_bench_records
from gpt2box.runs import metrics
from tests.helpers.commands import Command
from tests.helpers.gpu_runs import BITS
from tests.helpers.models import tiny_model
from tests.helpers.settings import options
from tests.helpers.training import process, wait_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TRAINED = {**BITS, "name": "run", "max_steps": 60, "save_interval": 10, "keep_last": 100}
GREEDY = SamplingParams(temperature=0)


def test_preflight_finds_the_card_and_nothing_wrong_with_it(volumes: Path, started: Command) -> None:
    done = started("preflight", "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    for name in ("driver", "pytorch", "card", "architecture", "vram", "bfloat16", "torch.compile"):
        assert found[name]["status"] != "failure", found[name]
    assert torch.cuda.get_device_name() in found["card"]["found"]


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_interrupted_ends_in_the_same_bits(volumes: Path, compiled: str, number: signal.Signals) -> None:
    settings = {**TRAINED, "compile": compiled}
    _, errors = (running := process(volumes, **{**settings, "name": "straight"})).communicate()
    assert running.returncode == 0, errors
    running = process(volumes, **settings)
    wait_for(volumes / "runs/run/checkpoints/step-00000020", running)
    running.send_signal(number)
    running.communicate()
    _, errors = (running := process(volumes, **settings)).communicate()
    assert running.returncode == 0 and "resuming from" in errors, errors
    ends = [volumes / "runs" / name / "checkpoints/last/state.json" for name in ("run", "straight")]
    states = [json.loads(path.read_text()) for path in ends]
    assert states[0]["digest"] == states[1]["digest"] and states[0]["step"] == 60
    rows = [metrics.read_rows(volumes / "runs" / name / "metrics.jsonl") for name in ("run", "straight")]
    first, second = ({row["step"]: row["digest"] for row in each if row["kind"] == "train"} for each in rows)
    assert first == second and len(first) == 60


def test_a_gpu_and_a_cpu_give_the_same_loss_and_text(volumes: Path, started: Command) -> None:
    settings = {**TRAINED, "deterministic": "false", "compile": "false"}
    done = started("train", *options(**settings))
    assert done.returncode == 0, done.stderr
    losses = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        changed = {**settings, "device": device, "dtype": dtype}
        done = started("train", *options(**changed), "--eval-only=true")
        assert done.returncode == 0, done.stderr
        losses[device, dtype] = float(done.stdout.split()[1])
    assert losses["cuda", "float32"] == pytest.approx(losses["cpu", "float32"], abs=1e-3)
    assert losses["cuda", "bfloat16"] == pytest.approx(losses["cpu", "float32"], abs=1e-2)
    flags = ("--temperature", "0", "--max-new-tokens", "40", "--prompt", "The")
    texts = [started("sample", "run", "--device", device, *flags) for device in ("cpu", "cuda")]
    assert texts[0].returncode == texts[1].returncode == 0, texts[1].stderr
    assert texts[0].stdout == texts[1].stdout


@pytest.mark.parametrize("weights", [None, "float16"])
def test_tokens_one_by_one_are_those_of_a_cpu(weights: str | None) -> None:
    on_cpu, on_gpu = tiny_model(), tiny_model().cuda()
    prompt = [3, 5, 8, 13, 21]
    expected = list(generate(Decoder(on_cpu, "float32"), prompt, 18, GREEDY, 0))
    found = list(generate(Decoder(on_gpu, weights), prompt, 18, GREEDY, 0))
    assert found == expected if weights is None else found[:6] == expected[:6]


def test_a_sweep_is_kept_and_training_goes_by_it(volumes: Path, started: Command) -> None:
    """With a micro-batch and a compiler left open."""
    left_open = {key: value for key, value in BITS.items() if key not in ("micro_batch_size", "deterministic")}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in left_open.items()]
    flags += ["--n-layer=2", "--eval-windows=8", "--compile=false", "--name=run"]
    done = started("bench", "--sweep", "--steps", "3", *flags)
    assert done.returncode == 0, done.stderr
    ways = read_bench_records(volumes / "runs" / "bench.json", torch.cuda.get_device_name())
    assert len(ways) > 3 and all(way.fits and 0 < way.one_s < way.many_s and way.peak_bytes > 2**28 for way in ways)
    done = started("train", *flags)
    assert done.returncode == 0 and "measured here" in done.stderr, done.stderr


FAILING = """
import sys, torch
from gpt2box.model.gpt2 import GPT2
from gpt2box.cli.main import main
plain, calls = GPT2.forward, [0]
def forward(self, ids, targets, scale=1.0):
    calls[0] += self.training
    # An id far beyond the vocabulary, which the card answers with an assertion of its own.
    return plain(self, ids + (10**6 if calls[0] > 30 else 0), targets, scale)
GPT2.forward = forward
sys.argv = ["gpt2box", *sys.argv[1:]]
main()
"""


def test_a_card_that_fails_ends_the_run_in_words_and_it_goes_on(volumes: Path) -> None:
    settings = {**TRAINED, "compile": "false", "max_steps": 30}
    command = [sys.executable, "-c", FAILING, "train", *options(**settings)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 75 and "the GPU failed in step" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert (volumes / "runs/run/checkpoints/step-00000010").exists()
    _, errors = (again := process(volumes, **settings)).communicate()
    assert again.returncode == 0 and "resuming from" in errors, errors


def test_logits_are_those_of_transformers(volumes: Path, started: Command) -> None:
    from transformers import GPT2LMHeadModel

    done = started("train", *options(**{**TRAINED, "compile": "false", "max_steps": 5}))
    assert done.returncode == 0, done.stderr
    folder = volumes / "runs/run/checkpoints/last"
    theirs = GPT2LMHeadModel.from_pretrained(folder).cuda().eval()
    ids = torch.randint(0, 50_257, (2, 100), device="cuda")
    ours = GPT2(load_shape(folder)).cuda().eval()
    load_hf_weights(ours, folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours.hidden_states(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)
