"""What is in an image, file by file, and where two builds of it differ: for scripts/image-verify.sh.

    docker export CONTAINER | image_contents.py list >LIST     a line a file, by name: kind, mode, owner, sha256
    image_contents.py compare LIST LIST                        what differs, with the reason where there must be one

Exit code 1 where something differs without a reason.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
from pathlib import Path

# What no two builds can have in common, and why.
REASONS = {
    r"etc/(hostname|hosts|resolv\.conf|mtab)|\.dockerenv|dev/.*": "made by Docker for each container",
    r"opt/python/conda-meta/.*": "conda notes when and from where it installed",
    r"etc/ld\.so\.cache|var/cache/ldconfig/.*": "the loader's cache holds the files' times",
    r"var/lib/dpkg/.*|var/lib/apt/.*|usr/share/doc/.*|usr/lib/.*|usr/bin/.*|var/cache/debconf/.*": (
        "Debian's or Ubuntu's packages are the newest of their release on the day of the build"
    ),
}
SHOWN = 20  # of each reason


def list_contents() -> None:
    """Of a tar file on standard input."""
    lines = []
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        for member in archive:
            what = member.linkname
            if member.isfile() and (file := archive.extractfile(member)):
                what = hashlib.sha256(file.read()).hexdigest()
            kind = "link" if member.issym() or member.islnk() else "folder" if member.isdir() else "file"
            name = member.name.encode("unicode_escape").decode()
            lines.append(f"{name}\t{kind}\t{member.mode:o}\t{member.uid}:{member.gid}\t{what}")
    print("\n".join(sorted(lines)))


def compare(first: Path, second: Path) -> int:
    """Print what differs; returns the exit code."""
    lists = [dict(line.split("\t", 1) for line in path.read_text().splitlines()) for path in (first, second)]
    differing = sorted(name for name in lists[0].keys() | lists[1].keys() if lists[0].get(name) != lists[1].get(name))
    by_reason: dict[str, list[str]] = {}
    for name in differing:
        reason = next((why for pattern, why in REASONS.items() if re.fullmatch(pattern, name)), "")
        by_reason.setdefault(reason, []).append(name)
    print(f"{len(lists[0]):,} and {len(lists[1]):,} files, links and folders; {len(differing):,} differ")
    for reason, names in sorted(by_reason.items()):
        print(f"{reason or 'WITHOUT A KNOWN REASON'}: {len(names):,}")
        for name in names[:SHOWN]:
            sides = [each.get(name, "missing").replace("\t", " ") for each in lists]
            print(f"  {name}" + (f"\n    {sides[0]}\n    {sides[1]}" if not reason else ""))
        if len(names) > SHOWN:
            print(f"  and {len(names) - SHOWN:,} more")
    return int("" in by_reason)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])))
    list_contents()
