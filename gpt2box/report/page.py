"""`gpt2box report`: a run on one page, report.html, which opens from disk without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.config.loader import SHIPPED, read_yaml
from gpt2box.errors import BadInput
from gpt2box.report.html import Chart, Html, Line, definition_list, plots_html, render_document, section, table, tag
from gpt2box.runs.history import Curve, History, read_history
from gpt2box.runs.listing import RunSummary, format_count, summarize_run
from gpt2box.runs.plan_file import read_plan
from gpt2box.utils.files import read_object, regular, whole, write_atomically
from gpt2box.utils.paths import shown
from gpt2box.utils.progress import called, duration, size

MAX_SAMPLES = 20  # shown, of those written along the way
MAX_SAMPLE_CHARACTERS = 5000  # shown of each
PUBLISHED_RESULT_KEYS = (  # what makes a run another one than that whose val_loss was published
    "dataset", "init_from", "n_layer", "n_head", "n_embd", "block_size", "tokens_per_step", "max_steps", "eval_windows",
)  # fmt: skip


def write_report(folder: Path) -> Path:
    """Write a run's report.html; returns its path. Whatever of the run is missing or torn is left out.

    Raises:
        VolumeUnwritable: through cli.py, where the run's folder cannot be written.
    """
    run = summarize_run(folder)
    figures = read_history(folder / "metrics.jsonl")
    plan, manifest = read_plan(folder), read_object(folder / "manifest.json")
    settings = read_settings(folder)
    parts = [
        tag("h1", run.name),
        summary(run, figures),
        section("What was trained on what", inputs_facts(plan, manifest, settings), settings_details(settings)),
        section("Curves", *curves_section(figures, whole(plan.get("tokens_per_step")))),
        section("Planned and measured", *planned_vs_measured(run, plan, settings, figures)),
        section("What it wrote", *samples_section(folder)),
        section("Go on from here", *next_commands(run, folder, mapping(manifest.get("dataset")))),
        tag("p", f"Written by gpt2box on {time.strftime('%Y-%m-%d at %H:%M')} from {shown(folder)}.", class_="note"),
    ]
    path = folder / "report.html"
    write_atomically(path, render_document(f"{run.name} · gpt2box", *parts))
    return path


def read_settings(folder: Path) -> dict[str, Any]:
    """config.yaml; nothing where it cannot be read, which the summary says."""
    try:
        return read_yaml(folder / "config.yaml")
    except BadInput:
        return {}


def summary(run: RunSummary, figures: History) -> Html:
    """How far it is and how good."""
    best = best_of(run, figures)
    text = [
        ("state", run.words()),
        ("step", f"{run.step:,} of {run.max_steps:,}" if run.max_steps else f"{run.step:,}"),
        ("best val_loss", f"{best[0]:.4f} at step {best[1]:,}" if best else "not evaluated yet"),
        ("tokens seen", format_count(run.tokens)),
        ("time in training", f"{duration(run.seconds)}, up to the newest checkpoint" if run.seconds else ""),
        ("on disk", size(run.size_bytes)),
    ]
    said = [definition_list(text)]
    if run.fault:
        said.append(tag("p", f"Damaged: {run.fault}", class_="bad"))
    if run.state == "training":
        said.append(
            tag("p", f"It is being trained: {called('report', run.name)} brings this page up to date.", class_="note")
        )
    return tag("div", *said)


def best_of(run: RunSummary, figures: History) -> tuple[float, int] | None:
    """The least val_loss and its step: of the curve, else of the checkpoint."""
    if best := figures.best():
        return best
    if run.best_val_loss is None or run.best_step is None:
        return None
    return run.best_val_loss, run.best_step


def inputs_facts(plan: dict[str, Any], manifest: dict[str, Any], settings: dict[str, Any]) -> Html:
    """The network, the text, the machine."""
    shape, dataset = mapping(plan.get("shape")), mapping(manifest.get("dataset"))
    splits, words = mapping(dataset.get("splits")), mapping(dataset.get("tokenizer"))
    tokens = {name: whole(mapping(split).get("tokens")) for name, split in splits.items()}
    network = (
        f"{whole(plan.get('parameters')):,} parameters: {shape.get('n_layer')} layers × {shape.get('n_embd')} wide, "
        f"{shape.get('n_head')} heads, context {shape.get('block_size')}"
    )
    micro = f"{plan.get('micro_batch_size')} × {shape.get('block_size')} × {plan.get('grad_accum_steps')}"
    rows = [
        ("begun from", str(settings.get("init_from", ""))),
        ("network", network if shape else ""),
        ("dataset", str(settings.get("dataset", ""))),
        ("its source", str(dataset.get("source") or "")),
        ("its tokens", ", ".join(f"{count:,} in {name}" for name, count in tokens.items())),
        ("tokenizer", f"{words.get('kind', '')}, {whole(words.get('vocab_size')):,} tokens" if words else ""),
        ("a step", f"{whole(plan.get('tokens_per_step')):,} tokens = {micro} micro-steps" if plan else ""),
        ("passes over the text", f"{plan['epochs']:.3g} in all" if isinstance(plan.get("epochs"), int | float) else ""),
        ("numbers", f"{plan.get('dtype')}, {'' if plan.get('compile') else 'not '}compiled" if plan else ""),
    ]
    return definition_list([*rows, *(("session", format_session(entry)) for entry in list_sessions(manifest))])


def list_sessions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The sessions of a manifest."""
    found = manifest.get("sessions")
    return [mapping(entry) for entry in found] if isinstance(found, list) else []


def format_session(entry: dict[str, Any]) -> str:
    """When a session began, and on what."""
    packages = mapping(entry.get("packages"))
    parts = [
        str(entry.get("started") or "").replace("T", " ").replace("Z", " UTC"),
        entry.get("device"),
        f"Python {entry.get('python')}",
        f"PyTorch {packages.get('torch')}",
    ]
    revision = str(entry.get("git") or entry.get("image") or "")
    return "; ".join(str(part) for part in parts if part) + f"; gpt2box {entry.get('gpt2box')} {revision[:12]}"


def mapping(value: object) -> dict[str, Any]:
    """Nothing for what is no mapping."""
    return value if isinstance(value, dict) else {}


def settings_details(settings: dict[str, Any]) -> Html:
    """All of config.yaml, folded away."""
    lines = "\n".join(f"{key}: {value}" for key, value in settings.items())
    return tag("details", tag("summary", "all settings"), tag("pre", lines)) if settings else Html()


def build_charts(figures: History, tokens_per_step: int) -> list[Chart]:
    """The charts of those figures that there are."""

    def lines(**labels: str) -> list[Line]:
        there = [(name, label) for name, label in labels.items() if name in figures.curves]
        return [Line(label, figures.curves[name], tokens_per_step, name == "val_loss") for name, label in there]

    charts = [
        Chart("Loss: cross-entropy, nats a token", lines(loss="train", val_loss="validation")),
        Chart("Learning rate", lines(learning_rate="learning rate")),
        Chart("Gradient norm, before clipping", lines(grad_norm="gradient norm")),
        Chart("Throughput, tokens a second", lines(tokens_per_sec="tokens/s")),
    ]
    if memory := figures.curves.get("peak_memory_bytes"):
        scaled = Curve(memory.step, memory.hours, memory.value / 2**30)
        charts.append(Chart("Most memory so far in the session, GiB", [Line("memory", scaled, tokens_per_step)], True))
    return [chart for chart in charts if chart.lines]


def curves_section(figures: History, tokens_per_step: int) -> list[Html]:
    """The charts, and what is to be said of them."""
    if not (charts := build_charts(figures, tokens_per_step)):
        return [tag("p", "Not one figure has been noted yet.")]
    said = [plots_html(charts)]
    if figures.left_out:
        said.append(tag("p", f"{figures.left_out:,} values that are no finite number are left out.", class_="note"))
    if len(figures.val_sets) > 1:
        text = f"val_loss was taken over {len(figures.val_sets)} different sets of windows, which do not compare."
        said.append(tag("p", text, class_="bad"))
    return said


def planned_vs_measured(
    run: RunSummary, plan: dict[str, Any], settings: dict[str, Any], figures: History
) -> list[Html]:
    """What was estimated before the first step, beside what came of it."""
    on_gpu = str(plan.get("device", "")).startswith("cuda")
    parts = {name: whole(count) for name, count in mapping(plan.get("memory")).items()}
    memory = float(sum(parts.values()) - parts.get("context", 0))  # PyTorch's own count has no CUDA context
    pace = float(whole(plan.get("expected_tokens_per_sec")))
    measured = {name: curve.value for name, curve in figures.curves.items()}
    most = float(measured["peak_memory_bytes"].max()) if "peak_memory_bytes" in measured else 0.0
    speed = float(np.median(measured["tokens_per_sec"])) if "tokens_per_sec" in measured else 0.0
    best, expected = best_of(run, figures), published_val_loss(settings)
    rows = [
        (
            "memory",
            size(memory) if memory else "",
            size(most) if most else "",
            format_ratio(most, memory) if on_gpu else "",
        ),
        (
            "tokens a second",
            f"{pace:,.0f}" if pace else "",
            f"{speed:,.0f}, the median" if speed else "",
            format_ratio(speed, pace),
        ),
        (
            f"time for {run.step:,} steps",
            duration(run.tokens / pace) if pace else "",
            duration(run.seconds) if run.seconds else "",
            format_ratio(run.seconds, run.tokens / pace) if pace else "",
        ),
        (
            "best val_loss",
            "" if expected is None else f"{expected:g}, published",
            f"{best[0]:.4f}" if best else "",
            "",
        ),
    ]
    if on_gpu:
        note = "Memory is what PyTorch takes from the card, CUDA's own part left out on both sides."
    else:
        note = (
            "Measured on a CPU, memory is that of the whole process, with Python and PyTorch; planned is what training "
            "itself takes. There is no estimate of a CPU's speed."
        )
    head = ("", "planned (estimated)", "measured", "measured / planned")
    return [table(head, rows), tag("p", note, class_="note")]


def published_val_loss(settings: dict[str, Any]) -> float | None:
    """The val_loss that is expected of a run with these settings; None where it is of another text or network."""
    expected = settings.get("expected_val_loss")
    if not isinstance(expected, int | float):
        return None
    shipped_with_it = [
        own for path in SHIPPED.glob("*.yaml") if (own := read_yaml(path)).get("expected_val_loss") == expected
    ]
    alike = [
        all(settings.get(key) == own[key] for key in PUBLISHED_RESULT_KEYS if key in own) for own in shipped_with_it
    ]
    return expected if any(alike) or not alike else None


def format_ratio(measured: float, planned: float) -> str:
    """A ratio, where both are known."""
    return f"{measured / planned:.2f}" if measured and planned else ""


def samples_section(folder: Path) -> list[Html]:
    """Texts of the run, some of many, the first and the last among them."""
    found = sorted((folder / "samples").glob("step-*.txt"))
    kept = sorted({round(i * (len(found) - 1) / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES)}) if found else []
    texts = (
        [(sample_title(found[i]), found[i], "") for i in kept]
        if len(found) > MAX_SAMPLES
        else [(sample_title(path), path, "") for path in found]
    )
    for name, title, look in (("best", "of the best weights", ""), ("before-after", "before and after", "columns")):
        path = folder / "samples" / f"{name}.txt"
        if path.exists():
            texts.append((title, path, look))
    if not texts:
        return [tag("p", "No samples: --sample-tokens was 0, or no evaluation has been done yet.", class_="note")]
    said = []
    if len(found) > len(kept) > 0 and len(found) > MAX_SAMPLES:
        said.append(tag("p", f"{len(kept)} of {len(found):,}; all are in {shown(folder / 'samples')}.", class_="note"))
    for number, (title, path, look) in enumerate(texts, 1):
        opened = {"open_": "open"} if number == len(texts) else {}
        text = tag("pre", read_sample_excerpt(path), class_=look) if look else tag("pre", read_sample_excerpt(path))
        said.append(tag("details", tag("summary", title), text, **opened))
    return said


def sample_title(path: Path) -> str:
    """step 1,500, of step-00001500.txt."""
    number = path.stem.removeprefix("step-")
    return f"step {int(number):,}" if number.isdecimal() else path.stem


def read_sample_excerpt(path: Path) -> str:
    """A text, or its beginning; nothing of what only links to one."""
    if path.is_symlink():
        return ""
    with open(path, encoding="utf-8", errors="replace", opener=regular) as file:
        text = file.read(MAX_SAMPLE_CHARACTERS + 1)
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + "…"


def next_commands(run: RunSummary, folder: Path, dataset: dict[str, Any]) -> list[Html]:
    """How to go on with the run."""
    in_characters = mapping(dataset.get("tokenizer")).get("kind") == "char"  # for which llama.cpp has no tokenizer
    rows = []
    if run.state in ("stopped", "training"):
        rows.append(
            (
                "go on training, once it is stopped" if run.state == "training" else "go on training",
                resume_command(folder),
            )
        )
    if run.state == "finished":
        rows.append(("train further", f"{resume_command(folder)} --max-steps {2 * max(run.step, 1)}"))
    rows += [
        ("read what it writes", called("sample", run.name)),
        ("measure it", called("eval", run.name)),
        ("for transformers and the Hub", called("export", run.name)),
    ]
    if not in_characters:
        rows.append(("for llama.cpp and Ollama", called("export", run.name, "--format", "gguf")))
    return [tag("p", title, tag("pre", command)) for title, command in rows]


def resume_command(folder: Path) -> str:
    """The command that goes on with the run's own settings."""
    return called("train", shown(folder / "config.yaml"))
