"""Run gpt2box commands in forked processes, which need not import PyTorch again.

Each line of JSON on standard input is a request, each line on standard output its answer. A forked process can be
killed at any instruction, like any other. It has a session of its own, so that its workers are killed with it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from typing import Any

LOADED = [  # imports of the commands, which take seconds
    "matplotlib.pyplot",
    "torch._inductor",
    "torch.utils.tensorboard",
    "gpt2box.cli.main",
    "gpt2box.data.prepare",
    "gpt2box.training.run",
    "gpt2box.export.export",
    "gpt2box.evaluation.memorization",
    "gpt2box.report.page",
    "gpt2box.evaluation.benchmarks",
]


def serve() -> None:
    """Answer requests until standard input ends."""
    for module in LOADED:  # not at the top: workers that a command starts read this file
        importlib.import_module(module)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a command; kill it if it is still running after `kill_after` seconds."""
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        become(request)
    kill_after = request.get("kill_after")
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if kill_after is not None and time.monotonic() - begun >= kill_after:
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:  # it has not called setsid yet
                os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.0005)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begun}


def become(request: dict[str, Any]) -> None:
    """Run the command in this forked process; never returns."""
    os.setsid()
    os.dup2(os.open(request.get("input", os.devnull), os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115, the server's own has read ahead
    for descriptor, path in enumerate(request["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), descriptor)
    if request.get("all_of_it"):
        os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if poison := request.get("poison"):
        from tests.helpers.poisoned_data import poison_data

        poison_data(*poison)
    if fault := request.get("fault"):
        under, at, error, lasting, calls = fault
        ctypes.CDLL(None).fault_arm(under.encode(), ctypes.c_long(at), error, int(lasting), calls.encode())
    sys.argv = ["gpt2box", *request["arguments"]]
    code = 1
    try:
        from gpt2box.cli.main import main

        main()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
