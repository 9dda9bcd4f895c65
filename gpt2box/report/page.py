"""`gpt2box report`: write a run's report.html, which opens from disk without a network."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.config.loader import PRESETS_DIR, read_yaml
from gpt2box.report.html import Chart, Html, Line, definition_list, plots_html, render_document, section, table, tag
from gpt2box.runs.formatting import format_count, format_loss, format_step
from gpt2box.runs.history import Curve, History
from gpt2box.runs.sessions import recorded_sessions
from gpt2box.runs.view import RunView, as_mapping
from gpt2box.utils.files import count_or_zero, open_regular, write_atomically
from gpt2box.utils.paths import display_path
from gpt2box.utils.progress import format_bytes, format_duration, gpt2box_command

MAX_SAMPLES = 20  # of those written during training
MAX_SAMPLE_CHARACTERS = 5000
PUBLISHED_RESULT_KEYS = (  # settings that must equal a preset's for its published val_loss to apply
    "dataset", "init_from", "n_layer", "n_head", "n_embd", "block_size", "tokens_per_step", "max_steps", "eval_windows",
)  # fmt: skip


def write_report(folder: Path) -> Path:
    """Write a run's report.html and return its path. Missing or damaged parts of the run are left out.

    Raises OSError: the run's folder cannot be written.
    """
    run = RunView(folder)
    written = f"Written by gpt2box on {time.strftime('%Y-%m-%d at %H:%M')} from {display_path(folder)}."
    parts = [
        tag("h1", run.name),
        summary_html(run),
        section("What was trained on what", inputs_facts(run), settings_details(run.settings)),
        section("Curves", *curves_section(run.history, run.tokens_per_step)),
        section("Planned and measured", *planned_vs_measured(run)),
        section("Samples", *samples_section(folder)),
        section("Next steps", *next_commands(run)),
        tag("p", written, class_="note"),
    ]
    path = folder / "report.html"
    write_atomically(path, render_document(f"{run.name} · gpt2box", *parts))
    return path


def summary_html(run: RunView) -> Html:
    """Render how far the run is and how good."""
    summary = run.summary
    seconds = f"{format_duration(summary.seconds)}, up to the newest checkpoint" if summary.seconds else ""
    facts = [
        ("state", summary.state_label),
        ("step", format_step(summary.step, summary.max_steps)),
        ("best val_loss", format_loss(*run.best) if run.best else "not evaluated yet"),
        ("tokens seen", format_count(summary.tokens)),
        ("time in training", seconds),
        ("on disk", format_bytes(summary.size_bytes)),
    ]
    parts = [definition_list(facts)]
    if summary.fault:
        parts.append(tag("p", f"Damaged: {summary.fault}", class_="bad"))
    if summary.state == "training":
        text = f"The run is being trained: {gpt2box_command('report', run.name)} updates this page."
        parts.append(tag("p", text, class_="note"))
    return tag("div", *parts)


def inputs_facts(run: RunView) -> Html:
    """Render the network, the text and the machines."""
    plan, settings = run.plan, run.settings
    shape, dataset = as_mapping(plan.get("shape")), as_mapping(run.manifest.get("dataset"))
    splits, tokenizer = as_mapping(dataset.get("splits")), as_mapping(dataset.get("tokenizer"))
    tokens = {name: count_or_zero(as_mapping(split).get("tokens")) for name, split in splits.items()}
    network = (
        f"{count_or_zero(plan.get('parameters')):,} parameters: {shape.get('n_layer')} layers × "
        f"{shape.get('n_embd')} wide, {shape.get('n_head')} heads, context {shape.get('block_size')}"
    )
    micro = f"{plan.get('micro_batch_size')} × {shape.get('block_size')} × {plan.get('grad_accum_steps')}"
    vocabulary = f"{tokenizer.get('kind', '')}, {count_or_zero(tokenizer.get('vocab_size')):,} tokens"
    epochs = plan.get("epochs")
    facts = [
        ("initialized from", str(settings.get("init_from", ""))),
        ("network", network if shape else ""),
        ("dataset", str(settings.get("dataset", ""))),
        ("its source", str(dataset.get("source") or "")),
        ("its tokens", ", ".join(f"{count:,} in {name}" for name, count in tokens.items())),
        ("tokenizer", vocabulary if tokenizer else ""),
        ("a step", f"{run.tokens_per_step:,} tokens = {micro} micro-steps" if plan else ""),
        ("epochs", f"{epochs:.3g} in all" if isinstance(epochs, int | float) else ""),
        ("precision", f"{plan.get('dtype')}, {'' if plan.get('compile') else 'not '}compiled" if plan else ""),
    ]
    return definition_list([*facts, *(("session", format_session(each)) for each in recorded_sessions(run.manifest))])


def format_session(session: dict[str, Any]) -> str:
    """Format when a session started, and on what."""
    packages = as_mapping(session.get("packages"))
    parts = [
        str(session.get("started") or "").replace("T", " ").replace("Z", " UTC"),
        session.get("device"),
        f"Python {session.get('python')}",
        f"PyTorch {packages.get('torch')}",
    ]
    revision = str(session.get("git") or session.get("image") or "")
    return "; ".join(str(part) for part in parts if part) + f"; gpt2box {session.get('gpt2box')} {revision[:12]}"


def settings_details(settings: dict[str, Any]) -> Html:
    """Render config.yaml, folded."""
    lines = "\n".join(f"{key}: {value}" for key, value in settings.items())
    return tag("details", tag("summary", "all settings"), tag("pre", lines)) if settings else Html()


def build_charts(history: History, tokens_per_step: int) -> list[Chart]:
    """Build the charts of a run; one without values is left out."""

    def lines(**labels: str) -> list[Line]:
        return [
            Line(label, history.curves[name], tokens_per_step, name == "val_loss")
            for name, label in labels.items()
            if name in history.curves
        ]

    charts = [
        Chart("Loss: cross-entropy, nats a token", lines(loss="train", val_loss="validation")),
        Chart("Learning rate", lines(learning_rate="learning rate")),
        Chart("Gradient norm, before clipping", lines(grad_norm="gradient norm")),
        Chart("Throughput, tokens a second", lines(tokens_per_sec="tokens/s")),
    ]
    if memory := history.curves.get("peak_memory_bytes"):
        scaled = Curve(memory.step, memory.hours, memory.value / 2**30)
        charts.append(Chart("Peak memory of the session, GiB", [Line("memory", scaled, tokens_per_step)], True))
    return [chart for chart in charts if chart.lines]


def curves_section(history: History, tokens_per_step: int) -> list[Html]:
    """Render the charts, and warnings about them."""
    if not (charts := build_charts(history, tokens_per_step)):
        return [tag("p", "No metrics yet.")]
    parts = [plots_html(charts)]
    if history.non_finite:
        parts.append(tag("p", f"{history.non_finite:,} values that are not finite are left out.", class_="note"))
    if len(history.val_sets) > 1:
        text = f"val_loss is over {len(history.val_sets)} different sets of windows, which do not compare."
        parts.append(tag("p", text, class_="bad"))
    return parts


def planned_vs_measured(run: RunView) -> list[Html]:
    """Render the estimates made before the first step beside the measurements."""
    plan, summary = run.plan, run.summary
    on_gpu = str(plan.get("device", "")).startswith("cuda")
    parts = {name: count_or_zero(count) for name, count in as_mapping(plan.get("memory")).items()}
    memory = float(sum(parts.values()) - parts.get("context", 0))  # PyTorch does not count the CUDA context
    rate = float(count_or_zero(plan.get("expected_tokens_per_sec")))
    seconds = summary.tokens / rate if rate else 0.0
    measured = {name: curve.value for name, curve in run.history.curves.items()}
    peak = float(measured["peak_memory_bytes"].max()) if "peak_memory_bytes" in measured else 0.0
    speed = float(np.median(measured["tokens_per_sec"])) if "tokens_per_sec" in measured else 0.0
    published = published_val_loss(run.settings)
    rows = [
        (
            "memory",
            format_bytes(memory) if memory else "",
            format_bytes(peak) if peak else "",
            format_ratio(peak, memory) if on_gpu else "",
        ),
        (
            "tokens a second",
            f"{rate:,.0f}" if rate else "",
            f"{speed:,.0f}, the median" if speed else "",
            format_ratio(speed, rate),
        ),
        (
            f"time for {summary.step:,} steps",
            format_duration(seconds) if rate else "",
            format_duration(summary.seconds) if summary.seconds else "",
            format_ratio(summary.seconds, seconds),
        ),
        (
            "best val_loss",
            "" if published is None else f"{published:g}, published",
            format_loss(run.best[0]) if run.best else "",
            "",
        ),
    ]
    if on_gpu:
        note = "Memory is what PyTorch allocates on the GPU; both sides leave out the CUDA context."
    else:
        note = (
            "On a CPU, measured memory is that of the whole process, with Python and PyTorch; planned memory is that "
            "of training alone. The speed of a CPU is not estimated."
        )
    head = ("", "planned (estimated)", "measured", "measured / planned")
    return [table(head, rows), tag("p", note, class_="note")]


def published_val_loss(settings: dict[str, Any]) -> float | None:
    """Return the published val_loss of a run with these settings; None if it is of another text or network."""
    expected = settings.get("expected_val_loss")
    if not isinstance(expected, int | float):
        return None
    presets = [
        own for path in PRESETS_DIR.glob("*.yaml") if (own := read_yaml(path)).get("expected_val_loss") == expected
    ]
    is_alike = [all(settings.get(key) == own[key] for key in PUBLISHED_RESULT_KEYS if key in own) for own in presets]
    return expected if any(is_alike) or not is_alike else None


def format_ratio(measured: float, planned: float) -> str:
    """Format a ratio; empty unless both are known."""
    return f"{measured / planned:.2f}" if measured and planned else ""


def samples_section(folder: Path) -> list[Html]:
    """Render up to MAX_SAMPLES samples, evenly spaced with the first and the last, and the final comparisons."""
    paths = sorted((folder / "samples").glob("step-*.txt"))
    count = min(len(paths), MAX_SAMPLES)
    chosen = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
    texts = [(sample_title(path), path, "") for path in chosen]
    for name, title, style in (("best", "of the best weights", ""), ("before-after", "before and after", "columns")):
        path = folder / "samples" / f"{name}.txt"
        if path.exists():
            texts.append((title, path, style))
    if not texts:
        return [tag("p", "No samples: --sample-tokens was 0, or no evaluation has been done yet.", class_="note")]
    parts = []
    if len(paths) > count:
        parts.append(
            tag("p", f"{count} of {len(paths):,}; all are in {display_path(folder / 'samples')}.", class_="note")
        )
    for number, (title, path, style) in enumerate(texts, 1):
        is_open = {"open_": "open"} if number == len(texts) else {}
        text = tag("pre", read_sample_excerpt(path), **({"class_": style} if style else {}))
        parts.append(tag("details", tag("summary", title), text, **is_open))
    return parts


def sample_title(path: Path) -> str:
    """Return `step 1,500` for step-00001500.txt."""
    number = path.stem.removeprefix("step-")
    return f"step {int(number):,}" if number.isdecimal() else path.stem


def read_sample_excerpt(path: Path) -> str:
    """Read the beginning of a sample. A link is not followed."""
    if path.is_symlink():
        return ""
    with open(path, encoding="utf-8", errors="replace", opener=open_regular) as file:
        text = file.read(MAX_SAMPLE_CHARACTERS + 1)
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + "…"


def next_commands(run: RunView) -> list[Html]:
    """Render the commands that continue from the run."""
    tokenizer = as_mapping(as_mapping(run.manifest.get("dataset")).get("tokenizer"))
    resume, summary = gpt2box_command("train", display_path(run.folder / "config.yaml")), run.summary
    rows = []
    if summary.state in ("stopped", "training"):
        rows.append(("resume, once it is stopped" if summary.state == "training" else "resume", resume))
    if summary.state == "finished":
        rows.append(("train further", f"{resume} --max-steps {2 * max(summary.step, 1)}"))
    rows += [
        ("generate text", gpt2box_command("sample", run.name)),
        ("evaluate it", gpt2box_command("eval", run.name)),
        ("export for transformers and the Hub", gpt2box_command("export", run.name)),
    ]
    if tokenizer.get("kind") != "char":  # llama.cpp has no character tokenizer
        rows.append(("export for llama.cpp and Ollama", gpt2box_command("export", run.name, "--format", "gguf")))
    return [tag("p", title, tag("pre", command)) for title, command in rows]
