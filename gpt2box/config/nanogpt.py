"""nanoGPT's config files and option names, for those who come over.

A config file's plain assignments are parsed, never executed. Every name nanoGPT knows is either
taken as it is, translated, or named as having no meaning here; nothing is dropped silently.
Names and defaults: nanoGPT's train.py.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2box.config.schema import Config, whole_number
from gpt2box.errors import BadInput
from gpt2box.utils.files import read_text

# nanoGPT's defaults, for what a config file leaves out.
DEFAULTS: dict[str, Any] = {
    "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "init_from": "scratch",
    "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024,
    "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600_000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600_000, "min_lr": 6e-5,
}  # fmt: skip

RENAMED = {
    "batch_size": "micro_batch_size",
    "max_iters": "max_steps",
    "lr_decay_iters": "decay_steps",
    "warmup_iters": "warmup_steps",
    "data_dir": "dataset",
    "out_dir": "name",
}
TRANSLATED = ["gradient_accumulation_steps", "eval_iters", "decay_lr"]
NO_MEANING = {
    "always_save_checkpoint": "the best and the last checkpoint are always kept",
    "backend": "it names the way several GPUs talk; this runs on one",
    "wandb_log": "metrics are in the run folder's metrics.jsonl; --wandb online sends them, too",
    "wandb_project": "the variable WANDB_PROJECT names it",
    "wandb_run_name": "the run's own name is taken",
}
# nanoGPT's dataset folders and what they are called here
DATASETS = {"shakespeare": "tinyshakespeare", "shakespeare_char": "tinyshakespeare-char"}
FLAGS = [*RENAMED, *TRANSLATED, *NO_MEANING]

SETTINGS = Config.model_fields.keys() | DEFAULTS.keys() | set(FLAGS) - NO_MEANING.keys()
PLAIN = "lines such as `batch_size = 4`: a number, a string, True or False, or arithmetic; the file is read, not run"

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def parse(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The assignments of a nanoGPT config file, and notes on statements that were passed over.

    Raises:
        BadInput: not Python, an assignment whose value is not a plain expression, or one in another statement.
    """
    try:
        tree = ast.parse(read_text(path), filename=str(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value.bit_length() > 64:
                raise ValueError(f"line {node.lineno}: a number of {node.value.bit_length():,} bits")
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"cannot read {path} as a nanoGPT config: {error}", "lines such as `batch_size = 4`") from error
    values: dict[str, Any] = {}
    notes = []
    for statement in tree.body:
        if given := assigned(statement):
            names, expression = given
            try:
                value = evaluate(expression, values)
            except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
                if set(names) <= NO_MEANING.keys():
                    value = None  # wandb_run_name = 'x' + str(time.time()) is usual
                else:
                    raise BadInput(
                        f"{path}, line {statement.lineno}: {names[0]} = {ast.unparse(expression)}", PLAIN
                    ) from error
            values.update(dict.fromkeys(names, value))
        elif not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
            first = ast.unparse(statement).splitlines()[0]
            if lost := stored_in(statement) & (SETTINGS | values.keys()):
                raise BadInput(f"{path}, line {statement.lineno}: {first}, which sets {min(lost)}", PLAIN)
            notes.append(f"{path.name}, line {statement.lineno}: passed over: {first}")
    return values, notes


def assigned(statement: ast.stmt) -> tuple[list[str], ast.expr] | None:
    """The names that a plain assignment gives a value, and the value; nothing of another statement."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    return (names, value) if value and len(names) == len(targets) else None


def stored_in(statement: ast.stmt) -> set[str]:
    """The names that a statement would set, or delete, were it run. A function's own are left out with it."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    names = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {name.id for name in names if not isinstance(name.ctx, ast.Load)}


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression made of literals, earlier names and arithmetic.

    Raises:
        ValueError, TypeError, ArithmeticError: it is something else, or too large.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand, names)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left, names), evaluate(node.right, names)
        if not all(isinstance(v, int | float) and abs(v) < 1e18 for v in (left, right)):
            raise ValueError("arithmetic on numbers of ordinary size only")
        return OPERATORS[type(node.op)](left, right)
    raise ValueError("not a plain expression")


def rename(values: dict[str, Any], source: str) -> dict[str, Any]:
    """nanoGPT's names replaced by ours where only the name differs.

    Raises:
        BadInput: both names of one setting are given.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        ours = RENAMED.get(key, key)
        if ours in renamed:
            raise BadInput(f"{source}: {key} and another name of {ours} are both given", "one of the two")
        if isinstance(value, str):
            value = folder_path(value) if key == "data_dir" else Path(value).name if key == "out_dir" else value
        renamed[ours] = value
    return renamed


def folder_path(folder: str) -> str:
    """data_dir is a folder even where it is written without a slash."""
    return folder if "/" in folder else f"./{folder}"


def numeric(micro_batch_size: Any) -> Any:
    """The micro-batch where it is a number; None for `auto` and where none is given."""
    return None if micro_batch_size in (None, "auto") else micro_batch_size


def merge(base: dict[str, Any], flags: dict[str, Any], foreign: bool) -> tuple[dict[str, Any], list[str]]:
    """Flags over the values of a file as our settings, and notes on what was translated.

    `foreign`: the file is nanoGPT's, so what it leaves out has nanoGPT's default.
    """
    given = {**base, **flags}
    meaningless = [f"{key} ({why})" for key, why in NO_MEANING.items() if is_on(given.get(key))]
    notes = [f"no meaning here: {', '.join(meaningless)}"] if meaningless else []
    base = {key: value for key, value in base.items() if key not in NO_MEANING}
    if foreign and "data_dir" in base:
        base.pop("dataset", None)
    base = rename(base, "the config")
    values = {**rename(DEFAULTS, "nanoGPT"), **base} if foreign else base
    from_file = numeric(values.get("micro_batch_size"))
    if foreign and "dataset" not in flags and "data_dir" not in flags:
        values["dataset"] = DATASETS.get(values["dataset"], values["dataset"])
    values = {**values, **rename({k: v for k, v in flags.items() if k not in NO_MEANING}, "flags")}

    accumulation = values.pop("gradient_accumulation_steps", None)
    if accumulation is not None and "tokens_per_step" not in (
        flags if "gradient_accumulation_steps" in flags else given
    ):
        # Without an accumulation flag the file's step stays, whatever micro-batch a flag asks for:
        # cutting the batch alone changes the training (nanoGPT's issue 411).
        now = numeric(values.get("micro_batch_size"))
        sequences = now if "gradient_accumulation_steps" in flags else from_file
        if sequences is None:
            raise BadInput(
                "gradient_accumulation_steps without a batch_size",
                "both, whose product is the step, or neither",
                "give --batch-size too, or --tokens-per-step alone",
            )
        tokens = whole(sequences, "batch_size") * whole(values.get("block_size", 1024), "block_size")
        values["tokens_per_step"] = tokens * whole(accumulation, "gradient_accumulation_steps")
        notes.append(
            f"tokens_per_step = {values['tokens_per_step']:,}: batch × block_size × gradient_accumulation_steps"
        )
    eval_iters = values.pop("eval_iters", None)
    if eval_iters is not None and "eval_windows" not in (flags if "eval_iters" in flags else given):
        values["eval_windows"] = whole(eval_iters, "eval_iters") * whole(from_file or 4, "batch_size")
        notes.append(f"eval_iters: {values['eval_windows']:,} fixed validation windows instead of random batches")
    if not is_on(values.pop("decay_lr", True)):
        values |= {"lr_schedule": "constant", "warmup_steps": 0}
    if values.get("dtype") == "float16":
        values["dtype"] = "auto"
        notes.append("dtype float16: bfloat16 where the GPU has it, which needs no loss scaling; float32 elsewhere")
    if values.get("init_from") == "resume":
        values["init_from"] = "scratch"
        notes.append("init_from resume: not needed, the same command always resumes")
    if foreign and str(values.get("init_from")).startswith("gpt2"):
        for key in ("n_layer", "n_head", "n_embd", "bias"):  # the weights decide, as in nanoGPT
            values.pop(key, None)
    return values, notes


def is_on(value: Any) -> bool:
    """The truth of a value from a file (True) or a flag ("True")."""
    return str(value).lower() not in ("none", "false", "0", "")


def whole(value: Any, name: str) -> int:
    """A whole number out of a file or a flag.

    Raises:
        BadInput: it is none, or below 1.
    """
    fault = BadInput(f"{name}: found {value!r}", "a whole number of at least 1")
    try:
        number = whole_number(value)
    except ValueError as error:
        raise fault from error
    if not isinstance(number, int) or number < 1:
        raise fault
    return number
