"""A run on two hosts: two network namespaces with a virtual cable between them, each with a disk of its own."""

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


HAS_LOCAL_ADDRESS = "local_addr" in inspect.signature(RendezvousStoreInfo.build).parameters


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Create two namespaces that reach only each other; returns their names."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    suffix = uuid.uuid4().hex[:6]
    names = [f"g2b-{suffix}-{side}" for side in "ab"]
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


@pytest.mark.skipif(
    not HAS_LOCAL_ADDRESS, reason="this torchrun identifies hosts by name only, and both have this machine's name"
)
def test_two_hosts_without_a_shared_disk_match_one_process(volumes: Path, tmp_path: Path, hosts: list[str]) -> None:
    train("straight", **SAME)
    shutil.copytree(volumes / "data", tmp_path / "elsewhere" / "data")
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400"]
    program = ["-m", "gpt2box", "train", *options(name="run", **SAME)]
    running = []
    for host, address, folder in zip(hosts, ADDRESSES, (volumes, tmp_path / "elsewhere"), strict=True):
        # torchrun would find the rendezvous host by name, but both hosts have this machine's name.
        is_host = f"--rdzv-conf=is_host={address == ADDRESSES[0]}"
        launch = ["-m", "torch.distributed.run", *rendezvous, is_host, f"--local-addr={address}"]
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
    assert len(written) == 1  # by rank 0, which may be on either host
    if written[0] != volumes:
        shutil.copytree(written[0] / "runs" / "run", volumes / "runs" / "run")
    assert_same(volumes, "run", "straight")
