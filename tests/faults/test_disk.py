"""A disk that fails at any call of a save: an intact checkpoint remains, the error is reported, the run resumes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from gpt2box.checkpoint import retention
from tests.helpers.disk_faults import NEVER, CommandServer, hash_outputs, leftovers, volumes_with_data

EVERY = int(os.environ.get("FAULT_EVERY", "9"))  # 1: fail at each call of a save (`make test-faults`)
FIRST = {"name": "run", "max_steps": 10, "eval_interval": 10, "save_interval": 5, "keep_last": 1}
SECOND = {**FIRST, "max_steps": 20, "save_interval": 10}


@pytest.fixture(scope="module")
def base_run(server: CommandServer, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train ten steps with two checkpoints; the next save deletes the older one."""
    volumes = volumes_with_data(prepared, tmp_path_factory.mktemp("disk") / "volumes")
    result = server.train(volumes, FIRST)
    assert result.exit_code == 0, result.output
    return volumes


def copy_run(base_run: Path, volumes: Path) -> Path:
    """Copy the run to `volumes`; returns the folder of its checkpoints."""
    shutil.rmtree(volumes, ignore_errors=True)
    shutil.copytree(base_run, volumes, symlinks=True)
    return volumes / "runs/run/checkpoints"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("permanent", [False, True])
def test_no_checkpoint_is_lost_wherever_the_disk_fails_in_a_save(
    server: CommandServer, base_run: Path, tmp_path: Path, error: int, permanent: bool
) -> None:
    calls = tmp_path / "calls"
    volumes = tmp_path / "volumes"
    folder = copy_run(base_run, volumes)
    straight = server.train(volumes, SECOND, fault=[str(folder), NEVER, 0, False, str(calls)])
    assert straight.exit_code == 0, straight.output
    expected = hash_outputs(folder / "step-00000020")
    lines = [line.split("\t")[0] for line in calls.read_text().splitlines()]
    tried = 0
    for at in range(1 + error % EVERY, len(lines) + 1, EVERY):
        if error == errno.ENOSPC and lines[at - 1] in ("unlink", "rmdir", "fsync"):
            continue  # these calls never report a full disk
        copy_run(base_run, volumes)
        before = hash_outputs(folder / "step-00000010")
        failed = server.train(volumes, SECOND, fault=[str(folder), at, error, permanent, ""])
        where = f"at call {at}, {lines[at - 1]}: {failed.output}"
        assert failed.exit_code == 78 or (failed.exit_code == 0 and not permanent), where
        assert "Traceback" not in failed.output and (failed.exit_code == 0 or "error: cannot" in failed.output), where
        saved = folder / "step-00000020"
        assert saved.exists() or hash_outputs(folder / "step-00000010") == before, where
        if not permanent and lines[at - 1] not in ("unlink", "rmdir"):
            assert not [path for path in leftovers(folder) if "00020" in path.name], where
        resumed = server.train(volumes, SECOND)
        assert resumed.exit_code == 0 and hash_outputs(folder / "step-00000020") == expected, (
            f"{where}\nthen: {resumed.output}"
        )
        assert not leftovers(folder) and retention.find_newest_checkpoint(folder)[1].step == 20, where  # type: ignore[index]
        tried += 1
    print(f"{errno.errorcode[error]} {'from' if permanent else 'at'} each of {tried} calls of a save: none lost")


def test_all_files_are_synced_before_a_checkpoint_gets_its_name(
    server: CommandServer, base_run: Path, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    folder = copy_run(base_run, tmp_path / "volumes")
    assert server.train(tmp_path / "volumes", SECOND, fault=[str(folder), NEVER, 0, False, str(calls)]).exit_code == 0
    trace = [tuple(line.split("\t")) for line in calls.read_text().splitlines()]
    temporary, final = folder / ".step-00000020.tmp", folder / "step-00000020"
    renamed = next(
        i for i, (call, path, to) in enumerate(trace) if (call, path, to) == ("rename", *map(str, (temporary, final)))
    )
    before = trace[:renamed]
    for path in final.iterdir():
        name = f".{path.name}.tmp" if path.name == "state.json" else path.name  # it gets its name by a rename, too
        written = [i for i, (call, at, _) in enumerate(before) if call == "write" and at == str(temporary / name)]
        synced = [i for i, (call, at, _) in enumerate(before) if call == "fsync" and at == str(temporary / name)]
        assert written and synced and max(written) < max(synced), path.name
    folder_synced = max(i for i, (call, at, _) in enumerate(before) if (call, at) == ("fsync", str(temporary)))
    assert folder_synced > max(i for i, (call, at, _) in enumerate(before) if call in ("write", "open", "rename"))
    assert trace[renamed + 1][:2] == ("fsync", str(folder))
    deleted = [i for i, (call, at, _) in enumerate(trace) if call in ("unlink", "rename") and "step-00000005" in at]
    assert deleted and min(deleted) > renamed + 1  # old checkpoints are deleted last
    assert retention.find_newest_checkpoint(folder)[1].step == 20 and (folder / "step-00000010").exists()  # type: ignore[index]


def test_a_volume_that_became_read_only_is_reported(server: CommandServer, base_run: Path, tmp_path: Path) -> None:
    folder = copy_run(base_run, tmp_path / "volumes")
    failed = server.train(tmp_path / "volumes", SECOND, fault=[str(folder), 1, errno.EROFS, True, ""])
    assert failed.exit_code == 78 and "Read-only file system" in failed.output and "Traceback" not in failed.output
