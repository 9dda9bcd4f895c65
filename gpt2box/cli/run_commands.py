"""Commands for existing runs: report, runs, verify, reproduce, watch.

Heavy imports stay inside the commands.
"""

import json
from pathlib import Path

import click

from gpt2box.errors import BadInput, Damaged, escape_control_lines


@click.command(short_help="Write a run's report as one page.")
@click.argument("run", required=False)
def report(run: str | None) -> None:
    """Write the report of RUN (the newest by default), volumes/runs/RUN/report.html.

    It shows settings, curves, samples, estimates beside measurements, and the next commands. The page needs no
    network, and can be written while the run is trained.
    """
    from gpt2box.report.page import write_report
    from gpt2box.runs.listing import find_run
    from gpt2box.utils.paths import display_path

    print(display_path(write_report(find_run(run))))


@click.command(short_help="List or compare runs.")
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--compare", is_flag=True, help="Compare settings and key figures, and write a page with all curves.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Path of the comparison page [default: volumes/runs/compare.html].",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs(names: tuple[str, ...], compare: bool, out: Path | None, as_json: bool) -> None:
    """List all runs, newest first, or only those named.

    \b
    gpt2box runs
    gpt2box runs --compare demo demo-2
    """
    names = tuple(dict.fromkeys(names))
    if out and not compare:
        raise BadInput("--out without --compare", "gpt2box runs --compare RUN RUN --out PAGE")
    if compare and len(names) < 2:
        raise BadInput("--compare with fewer than two runs", "two or more", "gpt2box runs lists them")
    from gpt2box.report import compare as comparison
    from gpt2box.runs.listing import find_run, format_table, list_run_folders
    from gpt2box.runs.view import RunView
    from gpt2box.utils.paths import display_path, runs_dir

    views = [RunView(folder) for folder in (map(find_run, names) if names else list_run_folders())]
    if compare:
        page = out or runs_dir() / "compare.html"
        compared = comparison.compare_runs(views)
        comparison.write_comparison(compared, page)
        if as_json:
            print(json.dumps({**compared.as_dict(), "page": display_path(page)}, indent=2))
        else:
            print(escape_control_lines("\n".join([*compared.lines(), f"curves: {display_path(page)}"])))
        return
    found = [view.summary for view in views]
    if not names:
        found.sort(key=lambda run: run.changed, reverse=True)
    if as_json:
        print(json.dumps([run.as_dict() for run in found], indent=2))
    elif found:
        print(escape_control_lines("\n".join(format_table(found))))
    else:
        print(f"no run in {display_path(runs_dir())} yet; gpt2box train demo makes one")


@click.command(short_help="Repeat steps of a run and compare the bits.")
@click.argument("run", required=False)
@click.option(
    "--from", "start", metavar="STEP", help="Start at this checkpoint and end at the next [default: the beginning]."
)
@click.option("--steps", type=click.IntRange(min=1), help="Number of steps [default: 20, or to the next checkpoint].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(run: str | None, start: str | None, steps: int | None, as_json: bool) -> None:
    """Repeat steps of RUN (the newest by default), and report whether weights and optimizer state are bit-identical.

    \b
    gpt2box verify demo                         its first 20 steps
    gpt2box verify demo --from step-00000500    from there to the next checkpoint

    If not, it names the first step and tensor that differ, and how this machine differs from the original. Nothing
    is written. Exit code 0: identical, 4: different.
    """
    from gpt2box.runs.listing import find_run
    from gpt2box.verify.verify import verify as verify_run

    verdict = verify_run(find_run(run), start, steps)
    print(json.dumps(verdict.as_dict(), indent=2) if as_json else escape_control_lines("\n".join(verdict.lines())))
    if not verdict.same:
        raise SystemExit(Damaged.exit_code)


@click.command(short_help="Repeat a run from its manifest.json.")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the new run [default: the original's, with -reproduced].")
@click.option("--device", help="auto, cpu, cuda or cuda:N [default: the original's].")
def reproduce(manifest: Path, name: str | None, device: str | None) -> None:
    """Repeat the run that MANIFEST, a manifest.json, describes: that file is enough.

    A known corpus is prepared and a published model downloaded; inputs that are missing or differ are listed. The
    same command again resumes.
    """
    from gpt2box.utils.signals import StopRequest

    stop = StopRequest().install()
    from gpt2box.verify.reproduce import reproduce as reproduce_run

    reproduce_run(manifest, name, device, stop)


@click.command(short_help="Show all runs live in a browser.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0: any free port.",
)
@click.option(
    "--token",
    envvar="GPT2BOX_WATCH_TOKEN",
    help="Token that a browser must send, $GPT2BOX_WATCH_TOKEN [default: none on loopback, otherwise random].",
)
@click.option(
    "--behind-loopback",
    is_flag=True,
    help="Require no token: --host is published on loopback only, as by compose.yaml.",
)
def watch(host: str, port: int, token: str | None, behind_loopback: bool) -> None:
    """Show all runs live on a page in the browser: http://localhost:8080.

    It shows curves, figures, GPU memory by process, samples and the log. It only reads, loads nothing from another
    host, and may be started and stopped at any time during training.
    """
    from gpt2box.dashboard.server import make_access_policy, serve

    serve(make_access_policy(host, port, token, behind_loopback))


COMMANDS = [report, runs, watch, verify, reproduce]
