"""What ends a command, in exit codes and words."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch

from gpt2box import cli
from gpt2box.errors import BadInput, MachineCannot, VolumeUnwritable
from tests.conftest import Command


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("ENOSPC", VolumeUnwritable),
        ("EFBIG", VolumeUnwritable),
        ("EACCES", VolumeUnwritable),
        ("EIO", VolumeUnwritable),
        ("EMFILE", MachineCannot),
        ("ENFILE", MachineCannot),
        ("EAGAIN", MachineCannot),
        ("EISDIR", BadInput),
        ("EBADF", type(None)),
    ],
)
def test_what_the_system_refuses_is_said_in_words(code: str, kind: type) -> None:
    number = getattr(errno, code)
    fault = cli.fault_of(OSError(number, os.strerror(number), "/some/file"))
    assert type(fault) is kind and (fault is None or "/some/file" in fault.found)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
    ids=["PyTorch's own", "CUDA's own", "a broken card", "a bug"],
)
def test_a_card_that_is_full_is_said_in_words(error: RuntimeError, full: bool) -> None:
    import gpt2box.machine.device  # noqa: F401, as whatever uses a card has it loaded

    fault = cli.card_is_full(error)
    assert bool(fault) == full and (fault is None or (fault.exit_code == 3 and "--device cpu" in fault.next_step))


def test_memory_that_runs_out_while_the_program_is_loaded_is_said_in_words(started: Command) -> None:
    done = started("train", "demo", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20)))
    assert done.returncode == 3 and "memory ran out" in done.stderr and "Traceback" not in done.stderr, done.stderr
