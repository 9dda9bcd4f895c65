"""A disk that fails at any one call of a save: the checkpoint before is whole, it is said, and the run goes on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from gpt2box.checkpoint import retention
from tests.helpers.disk_faults import NEVER, Server, digests, half_made, with_data

EVERY = int(os.environ.get("FAULT_EVERY", "9"))  # 1: at each call of a save (`make test-faults`)
FIRST = {"name": "run", "max_steps": 10, "eval_interval": 10, "save_interval": 5, "keep_last": 1}
SECOND = {**FIRST, "max_steps": 20, "save_interval": 10}


@pytest.fixture(scope="module")
def begun(server: Server, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with a run of ten steps and its two checkpoints, of which the next save removes the older."""
    volumes = with_data(prepared, tmp_path_factory.mktemp("disk") / "volumes")
    ended = server.train(volumes, FIRST)
    assert ended.code == 0, ended.said
    return volumes


def copy_of(begun: Path, volumes: Path) -> Path:
    """The same run once more; its checkpoints' folder."""
    shutil.rmtree(volumes, ignore_errors=True)
    shutil.copytree(begun, volumes, symlinks=True)
    return volumes / "runs/run/checkpoints"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("lasting", [False, True])
def test_wherever_the_disk_fails_in_a_save_nothing_is_lost(
    server: Server, begun: Path, tmp_path: Path, error: int, lasting: bool
) -> None:
    calls = tmp_path / "calls"
    volumes = tmp_path / "volumes"
    folder = copy_of(begun, volumes)
    straight = server.train(volumes, SECOND, fault=[str(folder), NEVER, 0, False, str(calls)])
    assert straight.code == 0, straight.said
    expected = digests(folder / "step-00000020")
    lines = [line.split("\t")[0] for line in calls.read_text().splitlines()]
    tried = 0
    for at in range(1 + error % EVERY, len(lines) + 1, EVERY):
        if error == errno.ENOSPC and lines[at - 1] in ("unlink", "rmdir", "fsync"):
            continue  # no disk says so there
        copy_of(begun, volumes)
        before = digests(folder / "step-00000010")
        failed = server.train(volumes, SECOND, fault=[str(folder), at, error, lasting, ""])
        where = f"at call {at}, {lines[at - 1]}: {failed.said}"
        assert failed.code == 78 or (failed.code == 0 and not lasting), where
        assert "Traceback" not in failed.said and (failed.code == 0 or "error: cannot" in failed.said), where
        whole = folder / "step-00000020"
        assert whole.exists() or digests(folder / "step-00000010") == before, where
        if not lasting and lines[at - 1] not in ("unlink", "rmdir"):
            assert not [path for path in half_made(folder) if "00020" in path.name], where
        again = server.train(volumes, SECOND)
        assert again.code == 0 and digests(folder / "step-00000020") == expected, f"{where}\nthen: {again.said}"
        assert not half_made(folder) and retention.find_newest_checkpoint(folder)[1].step == 20, where  # type: ignore[index]
        tried += 1
    print(f"{errno.errorcode[error]} {'from' if lasting else 'at'} each of {tried} calls of a save: none lost")


def test_what_a_checkpoint_is_made_of_is_durable_before_it_has_its_name(
    server: Server, begun: Path, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    folder = copy_of(begun, tmp_path / "volumes")
    assert server.train(tmp_path / "volumes", SECOND, fault=[str(folder), NEVER, 0, False, str(calls)]).code == 0
    found = [tuple(line.split("\t")) for line in calls.read_text().splitlines()]
    temporary, final = folder / ".step-00000020.tmp", folder / "step-00000020"
    renamed = next(
        i for i, (call, path, to) in enumerate(found) if (call, path, to) == ("rename", *map(str, (temporary, final)))
    )
    before = found[:renamed]
    for path in final.iterdir():
        name = f".{path.name}.tmp" if path.name == "state.json" else path.name  # which has its name by a rename, too
        wrote = [i for i, (call, at, _) in enumerate(before) if call == "write" and at == str(temporary / name)]
        synced = [i for i, (call, at, _) in enumerate(before) if call == "fsync" and at == str(temporary / name)]
        assert wrote and synced and max(wrote) < max(synced), path.name
    folder_synced = max(i for i, (call, at, _) in enumerate(before) if (call, at) == ("fsync", str(temporary)))
    assert folder_synced > max(i for i, (call, at, _) in enumerate(before) if call in ("write", "open", "rename"))
    assert found[renamed + 1][:2] == ("fsync", str(folder))
    gone = [i for i, (call, at, _) in enumerate(found) if call in ("unlink", "rename") and "step-00000005" in at]
    assert gone and min(gone) > renamed + 1  # an old one, only when this one is durable
    assert retention.find_newest_checkpoint(folder)[1].step == 20 and (folder / "step-00000010").exists()  # type: ignore[index]


def test_a_volume_that_is_gone_is_said(server: Server, begun: Path, tmp_path: Path) -> None:
    folder = copy_of(begun, tmp_path / "volumes")
    failed = server.train(tmp_path / "volumes", SECOND, fault=[str(folder), 1, errno.EROFS, True, ""])
    assert failed.code == 78 and "Read-only file system" in failed.said and "Traceback" not in failed.said
