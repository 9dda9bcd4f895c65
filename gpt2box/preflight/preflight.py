"""Check the machine for `gpt2box preflight`: gather facts, run small tests, print the findings."""

import http.client
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from gpt2box.config.schema import Config
from gpt2box.data import downloads
from gpt2box.errors import MachineCannot, VolumeUnwritable
from gpt2box.preflight import checks
from gpt2box.preflight.checks import Finding
from gpt2box.preflight.requirements import (
    CHAR,
    VOLUMES,
    checkpoint_bytes,
    group_needs_by_disk,
    has_dataset,
    known_corpus_name,
    list_disk_needs,
)
from gpt2box.preflight.smoke_test import probe
from gpt2box.system import gpu, host
from gpt2box.utils.paths import ensure_writable, raw_dir, volumes_dir
from gpt2box.utils.progress import log_line, pluralize

HUB_TIMEOUT_S = 10.0


def preflight(config: Config | None, text: Path | None, wanted: str, as_json: bool) -> None:
    """Check the machine for a job, or in general, and print the findings on standard output.

    `text` is the input of the job's dataset, if one was given.

    Raises MachineCannot: a check failed.
    """
    nvml = gpu.query_nvml()
    device = ("cuda" if nvml.gpus else "cpu") if wanted == "auto" else wanted
    if not as_json:
        log_line(f"checking this machine for {config.name if config else 'training'} on {device}")
    findings = list(all_findings(config, text, device, nvml))
    failures = [finding for finding in findings if finding.status == "failure"]
    if as_json:
        cards = [asdict(card) for card in nvml.gpus]
        report = {"ok": not failures, "device": device, "cards": cards, "findings": [asdict(f) for f in findings]}
        print(json.dumps(report, indent=2))
    else:
        for finding in findings:
            show(finding)
    if failures:
        raise MachineCannot(f"preflight: {', '.join(finding.name for finding in failures)} failed")
    warnings = sum(finding.status == "warning" for finding in findings)
    log_line(f"preflight: {len(findings) - warnings} ok, {pluralize(warnings, 'warning')}")


def show(finding: Finding) -> None:
    """Format a finding as a line, and its fix as a second one."""
    colour = {"ok": "green", "warning": "yellow", "failure": "red"}[finding.status]
    label = click.style(f"{finding.status:8}", fg=colour) if sys.stdout.isatty() else f"{finding.status:8}"
    print(f"{label} {finding.name:14} {finding.found}")
    if finding.fix:
        print(f"{'':23}   → {finding.fix}")


def all_findings(config: Config | None, text: Path | None, device: str, nvml: gpu.Nvml) -> Iterator[Finding]:
    """Run every check. A check that depends on another follows it."""
    on_gpu = device != "cpu"
    wanted = on_gpu if config is None or config.compile == "auto" else bool(config.compile)
    chosen = nvml.gpus[device_index(device) :][:1] if on_gpu else []
    old = any(card.capability and card.capability < (7, 0) for card in chosen)  # Triton does not support the GPU
    facts = probe(device, wanted and not old)
    if on_gpu:
        yield checks.driver(nvml, facts.get("cuda"), host.in_container(), host.is_wsl())
        if not nvml.fault:
            yield from card_findings(nvml, device_index(device))
    yield checks.pytorch(facts)
    if "cuda_error" not in facts and facts.get("torch"):
        capability = tuple(facts["capability"]) if "capability" in facts else None
        if on_gpu and "architectures" in facts:
            yield checks.architecture(capability, facts["architectures"], facts.get("cuda"))
        yield checks.bfloat16(facts, capability, on_gpu, config is not None and config.dtype == "bfloat16")
        if finding := checks.compiler(facts):
            yield finding
    yield from host_findings(config)
    written = [write_test(volume) for volume in VOLUMES]
    yield from written
    if all(finding.status == "ok" for finding in written):
        for names, free, here in group_needs_by_disk(config):
            what = ", ".join(need.what for need in here)
            yield checks.disk(", ".join(names), free, sum(need.size_bytes for need in here), what)
    if config is None or config.init_from != "scratch" or not config.dataset.endswith(CHAR):
        yield vocabulary()
    if config:
        yield checks.dataset(config.dataset, has_dataset(config), str(text or known_corpus_name(config.dataset)))
    if config and (from_hub := [need.what for need in list_disk_needs(config) if need.hub]):
        yield hub(from_hub)


def device_index(device: str) -> int:
    """Return the number in a device's name: 1 for cuda:1."""
    return int(device.partition(":")[2] or 0)


def card_findings(nvml: gpu.Nvml, index: int) -> Iterator[Finding]:
    """Check the chosen GPU with the driver's facts."""
    chosen = checks.card(nvml, index, host.in_container())
    yield chosen
    if chosen.status == "ok":
        yield checks.vram(nvml.gpus[index])
        yield from checks.health(nvml.gpus[index])


def host_findings(config: Config | None) -> Iterator[Finding]:
    """Check the host: container, memory, CPU and shared memory."""
    if image := os.environ.get("GPT2BOX_IMAGE"):
        stack, version, revision, _ = [*image.split(" "), "", "", "", ""][:4]
        yield Finding("container", "ok", f"image {stack}, gpt2box {version}, revision {revision[:12]}")
    elif not host.in_container():
        yield checks.runtime(host.docker_runtimes())
    total, available = host.memory_bytes()
    needed = (4 << 30) + (checkpoint_bytes(config) if config else 0)  # plus the staging buffer of a checkpoint
    yield checks.memory(total, available, needed)
    yield checks.cpu(host.cpu_cores())
    yield checks.shared_memory(host.shm_bytes())
    if host.is_wsl():
        yield windows()


def windows() -> Finding:
    """Report the limits of Linux under Windows."""
    if any(host.is_windows_drive(volumes_dir() / volume) for volume in VOLUMES):
        fix = "keep gpt2box inside WSL's own file system, such as ~/gpt2box"
        return Finding("wsl", "warning", f"{volumes_dir()} is on a Windows drive, many times slower", fix)
    found = (
        "under Windows: .wslconfig limits the memory, the driver does not name who holds the card's, "
        "and a container sees every card whatever GPU in .env says (choose with --device cuda:N)"
    )
    return Finding("wsl", "ok", found)


def write_test(volume: str) -> Finding:
    """Check that a volume can be written, by writing a file."""
    folder = volumes_dir() / volume
    try:
        with tempfile.TemporaryFile(dir=ensure_writable(folder)) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except VolumeUnwritable as error:
        return Finding(f"write: {volume}", "failure", error.found, error.next_step)
    except OSError as error:
        return Finding(f"write: {volume}", "failure", f"{folder}: {error.strerror}", "free space, or another disk")
    return Finding(f"write: {volume}", "ok", str(folder))


def vocabulary() -> Finding:
    """Check that GPT-2's vocabulary is present and intact; otherwise it is fetched when it is first needed."""
    there = downloads.find_local_copy(downloads.GPT2_RANKS, raw_dir())
    if there is None:
        fix = "prepare fetches it; without network put a copy into " + str(raw_dir())
        return Finding("vocabulary", "warning", f"{downloads.GPT2_RANKS.filename} is not there yet", fix)
    if downloads.sha256_of(there) != downloads.GPT2_RANKS.sha256:
        return Finding("vocabulary", "failure", f"{there} is not the file that was published", f"remove {there}")
    return Finding("vocabulary", "ok", str(there))


def hub(wanted: list[str]) -> Finding:
    """Check that the Hub answers. Called only if something must be downloaded from it."""
    address = downloads.hub_endpoint()
    what = f"needed for {', '.join(wanted)}"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # an HTTP error is an answer, too
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        fix = "network, a mirror in HF_ENDPOINT, or the files in volumes/models"
        return Finding("hub", "failure", f"{address} does not answer ({reason}), {what}", fix)
    return Finding("hub", "ok", f"{address} answers; {what}")


def check_gpu(wanted: str) -> None:
    """Check the driver and the GPU against this build of PyTorch before a job, without running tests on the GPU.

    Raises MachineCannot: a check failed; the message is the finding's.
    """
    nvml = gpu.query_nvml()
    if wanted == "cpu" or (wanted == "auto" and not nvml.gpus):
        return
    import torch

    if wanted == "auto" and torch.version.cuda is None:
        return  # a CPU build of PyTorch is installed
    index = device_index(wanted)
    findings = [checks.driver(nvml, torch.version.cuda, host.in_container(), host.is_wsl())]
    if not nvml.fault:
        findings.append(checks.card(nvml, index, host.in_container()))
    if all(finding.status != "failure" for finding in findings):
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            capability = torch.cuda.get_device_capability(index)
            findings.append(checks.architecture(capability, torch.cuda.get_arch_list(), torch.version.cuda))
        except Exception as error:  # a broken driver may raise anything
            lines = str(error).splitlines() or [type(error).__name__]
            findings.append(Finding("pytorch", "failure", f"{torch.__version__}: {lines[0]}", "gpt2box preflight"))
    for finding in findings:
        if finding.status == "failure":
            raise MachineCannot(f"{finding.name}: {finding.found}", f"a GPU for device {wanted}", finding.fix)
