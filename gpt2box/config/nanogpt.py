"""Read nanoGPT's config files and translate its setting names.

A config file's plain assignments are parsed, never executed. Every setting of nanoGPT's train.py is used, translated
or reported as ignored; nothing is dropped silently.
"""

import ast
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2box.config.schema import Config, parse_whole_number
from gpt2box.errors import BadInput
from gpt2box.utils.files import read_text

# nanoGPT's defaults for settings that its config file omits.
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
IGNORED = {
    "always_save_checkpoint": "the best and the last checkpoint are always kept",
    "backend": "the device decides: nccl on GPUs, gloo on CPUs",
    "wandb_log": "metrics are in the run folder's metrics.jsonl; --wandb online also sends them",
    "wandb_project": "set the variable WANDB_PROJECT",
    "wandb_run_name": "the run's own name is used",
}
# nanoGPT's dataset folders and their names here
DATASETS = {"shakespeare": "tinyshakespeare", "shakespeare_char": "tinyshakespeare-char"}
NANOGPT_FLAGS = [*RENAMED, *TRANSLATED, *IGNORED]

KNOWN_NAMES = Config.model_fields.keys() | DEFAULTS.keys() | set(NANOGPT_FLAGS) - IGNORED.keys()
EXPECTED_STATEMENTS = (
    "lines such as `batch_size = 4`: a number, a string, True or False, or arithmetic; the file is read, not run"
)

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def parse_config_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a nanoGPT config file. Returns its assignments and notes on skipped statements.

    Raises BadInput: it is not Python, a value is not a plain expression, or an assignment is nested in a statement.
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
        if given := plain_assignment(statement):
            names, expression = given
            try:
                value = evaluate_expression(expression, values)
            except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
                if set(names) <= IGNORED.keys():
                    value = None  # wandb_run_name = 'x' + str(time.time()) is usual
                else:
                    raise BadInput(
                        f"{path}, line {statement.lineno}: {names[0]} = {ast.unparse(expression)}", EXPECTED_STATEMENTS
                    ) from error
            values.update(dict.fromkeys(names, value))
        elif not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
            first = ast.unparse(statement).splitlines()[0]
            if lost := assigned_names(statement) & (KNOWN_NAMES | values.keys()):
                raise BadInput(f"{path}, line {statement.lineno}: {first}, which sets {min(lost)}", EXPECTED_STATEMENTS)
            notes.append(f"{path.name}, line {statement.lineno}: skipped: {first}")
    return values, notes


def plain_assignment(statement: ast.stmt) -> tuple[list[str], ast.expr] | None:
    """Return the names and the value of a plain assignment; None for any other statement."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    return (names, value) if value and len(names) == len(targets) else None


def assigned_names(statement: ast.stmt) -> set[str]:
    """Return the names that a statement would set or delete if it ran. Skips functions and classes."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    names = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {name.id for name in names if not isinstance(name.ctx, ast.Load)}


def evaluate_expression(node: ast.expr, names: dict[str, Any]) -> Any:
    """Evaluate an expression of literals, earlier names and arithmetic.

    Raises ValueError, TypeError, ArithmeticError: the expression is anything else, or too large.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate_expression(node.operand, names)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate_expression(node.left, names), evaluate_expression(node.right, names)
        if not all(isinstance(v, int | float) and abs(v) < 1e18 for v in (left, right)):
            raise ValueError("arithmetic on numbers of ordinary size only")
        return OPERATORS[type(node.op)](left, right)
    raise ValueError("not a plain expression")


def translate_names(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Replace nanoGPT's setting names by ours if only the name differs.

    Raises BadInput: both names of one setting are given.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        ours = RENAMED.get(key, key)
        if ours in renamed:
            raise BadInput(f"{source}: {key} and another name of {ours} are both given", "one of the two")
        if isinstance(value, str):
            value = as_folder_path(value) if key == "data_dir" else Path(value).name if key == "out_dir" else value
        renamed[ours] = value
    return renamed


def as_folder_path(folder: str) -> str:
    """Mark data_dir as a path even if it has no slash."""
    return folder if "/" in folder else f"./{folder}"


def numeric_or_none(micro_batch_size: Any) -> Any:
    """Return the micro-batch size if it is a number, None if it is `auto` or not given."""
    return None if micro_batch_size in (None, "auto") else micro_batch_size


def merge_settings(base: dict[str, Any], flags: dict[str, Any], foreign: bool) -> tuple[dict[str, Any], list[str]]:
    """Merge a file's values and flags into our settings. Returns them and notes on translations.

    `foreign`: the file is nanoGPT's, so settings that it omits have nanoGPT's defaults.
    """
    given = {**base, **flags}
    ignored = [f"{key} ({why})" for key, why in IGNORED.items() if is_true(given.get(key))]
    notes = [f"ignored: {', '.join(ignored)}"] if ignored else []
    base = {key: value for key, value in base.items() if key not in IGNORED}
    if foreign and "data_dir" in base:
        base.pop("dataset", None)
    base = translate_names(base, "the config")
    values = {**translate_names(DEFAULTS, "nanoGPT"), **base} if foreign else base
    from_file = numeric_or_none(values.get("micro_batch_size"))
    if foreign and "dataset" not in flags and "data_dir" not in flags:
        values["dataset"] = DATASETS.get(values["dataset"], values["dataset"])
    values = {**values, **translate_names({k: v for k, v in flags.items() if k not in IGNORED}, "flags")}

    accumulation = values.pop("gradient_accumulation_steps", None)
    if accumulation is not None and "tokens_per_step" not in (
        flags if "gradient_accumulation_steps" in flags else given
    ):
        # Without an accumulation flag the file's tokens per step stay, whatever micro-batch a flag asks for:
        # reducing the batch alone changes the training (nanoGPT's issue 411).
        now = numeric_or_none(values.get("micro_batch_size"))
        sequences = now if "gradient_accumulation_steps" in flags else from_file
        if sequences is None:
            raise BadInput(
                "gradient_accumulation_steps without a batch_size",
                "both, whose product is the step's size, or neither",
                "give --batch-size too, or --tokens-per-step alone",
            )
        tokens = parse_positive_int(sequences, "batch_size") * parse_positive_int(
            values.get("block_size", 1024), "block_size"
        )
        values["tokens_per_step"] = tokens * parse_positive_int(accumulation, "gradient_accumulation_steps")
        notes.append(
            f"tokens_per_step = {values['tokens_per_step']:,}: batch × block_size × gradient_accumulation_steps"
        )
    eval_iters = values.pop("eval_iters", None)
    if eval_iters is not None and "eval_windows" not in (flags if "eval_iters" in flags else given):
        values["eval_windows"] = parse_positive_int(eval_iters, "eval_iters") * parse_positive_int(
            from_file or 4, "batch_size"
        )
        notes.append(f"eval_iters: {values['eval_windows']:,} fixed validation windows instead of random batches")
    if not is_true(values.pop("decay_lr", True)):
        values |= {"lr_schedule": "constant", "warmup_steps": 0}
    if values.get("dtype") == "float16":
        values["dtype"] = "auto"
        notes.append("dtype float16: bfloat16 if the GPU supports it, which needs no loss scaling; else float32")
    if values.get("init_from") == "resume":
        values["init_from"] = "scratch"
        notes.append("init_from resume: not needed, the same command always resumes")
    if foreign and str(values.get("init_from")).startswith("gpt2"):
        for key in ("n_layer", "n_head", "n_embd", "bias"):  # the weights decide, as in nanoGPT
            values.pop(key, None)
    return values, notes


def is_true(value: Any) -> bool:
    """Return the truth of a value from a file (True) or a flag ("True")."""
    return str(value).lower() not in ("none", "false", "0", "")


def parse_positive_int(value: Any, name: str) -> int:
    """Parse a positive whole number from a file or a flag. Raises BadInput: it is not a whole number, or below 1."""
    fault = BadInput(f"{name}: found {value!r}", "a whole number of at least 1")
    try:
        number = parse_whole_number(value)
    except ValueError as error:
        raise fault from error
    if not isinstance(number, int) or number < 1:
        raise fault
    return number
