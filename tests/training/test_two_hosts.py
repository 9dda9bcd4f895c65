"""Two machines, each a network namespace with disks of its own, on a cable between them."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from tests.helpers.settings import options
from tests.helpers.torchrun import SAME, assert_same
from tests.helpers.training import train

ADDRESSES = ["10.77.0.1", "10.77.0.2"]


BY_ADDRESS = "local_addr" in inspect.signature(RendezvousStoreInfo.build).parameters


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that see each other and nothing else."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    mark = uuid.uuid4().hex[:6]
    names = [f"g2b-{mark}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.skipif(not BY_ADDRESS, reason="this torchrun finds hosts by their names alone, which are equal here")
def test_two_hosts_without_a_common_disk_learn_what_one_process_learns(
    volumes: Path, tmp_path: Path, hosts: list[str]
) -> None:
    train("straight", **SAME)
    shutil.copytree(volumes / "data", tmp_path / "elsewhere" / "data")
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400"]
    program = ["-m", "gpt2box", "train", *options(name="run", **SAME)]
    running = []
    for host, address, folder in zip(hosts, ADDRESSES, (volumes, tmp_path / "elsewhere"), strict=True):
        # Both have this machine's name, by which torchrun would know who is meant by the address.
        first = f"--rdzv-conf=is_host={address == ADDRESSES[0]}"
        launch = ["-m", "torch.distributed.run", *meet, first, f"--local-addr={address}"]
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable", "GPT2BOX_VOLUMES": str(folder)}
        command = ["ip", "netns", "exec", host, sys.executable, *launch, *program]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | own)
        )
    try:
        said = [one.communicate(timeout=300)[1] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0, 0], said
    assert "finished at step 20" in said[0] + said[1]
    written = [folder for folder in (volumes, tmp_path / "elsewhere") if (folder / "runs" / "run").exists()]
    assert len(written) == 1  # by the first rank, which either host may have
    if written[0] != volumes:
        shutil.copytree(written[0] / "runs" / "run", volumes / "runs" / "run")
    assert_same(volumes, "run", "straight")
