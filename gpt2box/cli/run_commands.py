"""The commands for runs that are there: what they are, how they went, how they compare.

Part of the command line (cli.py), and like it without heavy imports at the top.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from gpt2box.errors import BadInput, Damaged, harmless_lines


@click.command(short_help="Write a run down on one page.")
@click.argument("run", required=False)
def report(run: str | None) -> None:
    """Write RUN (the newest by default) down on one page, volumes/runs/RUN/report.html.

    Settings, curves to look closer at, samples, planned against measured, the next commands. The page needs no
    network, and can be written while the run is trained.
    """
    from gpt2box.report.page import write_report
    from gpt2box.runs.listing import find_run
    from gpt2box.utils.paths import shown

    print(shown(write_report(find_run(run))))


@click.command(short_help="List the runs and how they went, or compare them.")
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("--compare", is_flag=True, help="Settings that differ, key figures, and a page with the curves together.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="That page [default: volumes/runs/compare.html]."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def runs(names: tuple[str, ...], compare: bool, out: Path | None, as_json: bool) -> None:
    """List the runs, newest first, or only those named.

    \b
    gpt2box runs
    gpt2box runs --compare demo demo-2
    """
    names = tuple(dict.fromkeys(names))
    if out and not compare:
        raise BadInput("--out without --compare", "gpt2box runs --compare RUN RUN --out PAGE")
    if compare and len(names) < 2:
        raise BadInput("--compare with less than two runs", "two or more", "gpt2box runs lists them")
    from gpt2box.report import compare as comparison
    from gpt2box.runs.listing import find_run, format_table, list_run_folders
    from gpt2box.runs.view import RunView
    from gpt2box.utils.paths import runs_dir, shown

    views = [RunView(folder) for folder in (map(find_run, names) if names else list_run_folders())]
    if compare:
        page = out or runs_dir() / "compare.html"
        compared = comparison.compare_runs(views)
        comparison.write_comparison(compared, page)
        if as_json:
            print(json.dumps({**compared.as_dict(), "page": shown(page)}, indent=2))
        else:
            print(harmless_lines("\n".join([*compared.lines(), f"curves: {shown(page)}"])))
        return
    found = [view.summary for view in views]
    if not names:
        found.sort(key=lambda run: run.changed, reverse=True)
    if as_json:
        print(json.dumps([run.as_dict() for run in found], indent=2))
    elif found:
        print(harmless_lines("\n".join(format_table(found))))
    else:
        print(f"no run in {shown(runs_dir())} yet; gpt2box train demo makes one")


@click.command(short_help="Do steps of a run again and compare the bits.")
@click.argument("run", required=False)
@click.option("--from", "start", metavar="STEP", help="From this checkpoint, to the next [default: the beginning].")
@click.option("--steps", type=click.IntRange(min=1), help="So many steps [default: 20, or to the next checkpoint].")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def verify(run: str | None, start: str | None, steps: int | None, as_json: bool) -> None:
    """Do steps of RUN (the newest by default) again, and say whether they come to the same bits.

    \b
    gpt2box verify demo                         its first 20 steps
    gpt2box verify demo --from step-00000500    from there to the next checkpoint

    If not: the first step and tensor found to differ, and what differs between the machine then and now. Nothing is
    written. Exit code 0: the same, 4: different.
    """
    from gpt2box.runs.listing import find_run
    from gpt2box.verify.verify import verify as do_again

    verdict = do_again(find_run(run), start, steps)
    print(json.dumps(verdict.as_dict(), indent=2) if as_json else harmless_lines("\n".join(verdict.lines())))
    if not verdict.same:
        raise SystemExit(Damaged.exit_code)


@click.command(short_help="Train again what a manifest.json is of.")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("--name", help="The new run's name [default: the run's, with -reproduced].")
@click.option("--device", help="auto, cpu, cuda or cuda:N [default: the run's].")
def reproduce(manifest: Path, name: str | None, device: str | None) -> None:
    """Train once more what MANIFEST, a run's manifest.json, is of: from nothing but that file.

    A known corpus is prepared, a published model downloaded; what of the inputs is missing or differs is named. The
    same command again resumes.
    """
    from gpt2box.utils.signals import StopRequest

    stop = StopRequest().install()
    from gpt2box.verify.reproduce import reproduce as start_again

    start_again(manifest, name, device, stop)


@click.command(short_help="Show all runs, live, in a browser.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all there are.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8080, show_default=True, help="0: one that is free.")
@click.option(
    "--token",
    envvar="GPT2BOX_WATCH_TOKEN",
    help="What a browser must bring, $GPT2BOX_WATCH_TOKEN [default: none on this machine, beyond it one that is made].",
)
@click.option("--behind-loopback", is_flag=True, help="No token for --host: what publishes the port keeps it local.")
def watch(host: str, port: int, token: str | None, behind_loopback: bool) -> None:
    """Show all runs, live, on a page in the browser: http://localhost:8080.

    Curves, figures, the card's memory by process, samples, the log. It only reads, loads nothing from another
    host, and may be started and ended at any time, whatever the training does.
    """
    from gpt2box.dashboard.server import make_access_policy, serve

    serve(make_access_policy(host, port, token, behind_loopback))


COMMANDS = [report, runs, watch, verify, reproduce]
