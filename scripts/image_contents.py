"""List an image's files, and compare the lists of two builds; used by scripts/compare_image_builds.sh.

    docker export CONTAINER | image_contents.py list >LIST     one line per file: name, kind, mode, owner, sha256
    image_contents.py compare LIST LIST                        print the differences, grouped by expected reason

Exit code 1 if a difference has no expected reason.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
from pathlib import Path

# Files that always differ between two builds, and why.
EXPECTED_DIFFERENCES = {
    r"etc/(hostname|hosts|resolv\.conf|mtab)|\.dockerenv|dev/.*": "Docker creates it for each container",
    r"opt/python/conda-meta/.*": "conda records the time and source of the installation",
    r"etc/ld\.so\.cache|var/cache/ldconfig/.*": "the loader's cache contains modification times",
    r"var/lib/dpkg/.*|var/lib/apt/.*|usr/share/doc/.*|usr/lib/.*|usr/bin/.*|var/cache/debconf/.*": (
        "the distribution's packages are the newest on the day of the build"
    ),
}
MAX_SHOWN = 20  # per reason


def list_contents() -> None:
    """List the files of the tar archive on standard input."""
    lines = []
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for member in archive:
            content = member.linkname
            if member.isfile() and (file := archive.extractfile(member)):
                content = hashlib.sha256(file.read()).hexdigest()
            kind = "link" if member.issym() or member.islnk() else "folder" if member.isdir() else "file"
            name = member.name.encode("unicode_escape").decode()
            lines.append(f"{name}\t{kind}\t{member.mode:o}\t{member.uid}:{member.gid}\t{content}")
    print("\n".join(sorted(lines)))


def compare(first: Path, second: Path) -> int:
    """Print the differences; return the exit code."""
    lists = [dict(line.split("\t", 1) for line in path.read_text().splitlines()) for path in (first, second)]
    differing = sorted(name for name in lists[0].keys() | lists[1].keys() if lists[0].get(name) != lists[1].get(name))
    by_reason: dict[str, list[str]] = {}
    for name in differing:
        reason = next((reason for pattern, reason in EXPECTED_DIFFERENCES.items() if re.fullmatch(pattern, name)), "")
        by_reason.setdefault(reason, []).append(name)
    print(f"{len(lists[0]):,} and {len(lists[1]):,} files, links and folders; {len(differing):,} differ")
    for reason, names in sorted(by_reason.items()):
        print(f"{reason or 'UNEXPLAINED'}: {len(names):,}")
        for name in names[:MAX_SHOWN]:
            sides = [each.get(name, "missing").replace("\t", " ") for each in lists]
            print(f"  {name}" + (f"\n    {sides[0]}\n    {sides[1]}" if not reason else ""))
        if len(names) > MAX_SHOWN:
            print(f"  and {len(names) - MAX_SHOWN:,} more")
    return int("" in by_reason)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])))
    list_contents()
