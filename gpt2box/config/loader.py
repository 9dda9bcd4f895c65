"""Settings from a file and from flags: which file a CONFIG argument means, and how the two are merged.

`load` takes defaults, a file and flags (later wins) and has the whole checked (config.py).
"""

from __future__ import annotations

import difflib
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from gpt2box.config import nanogpt
from gpt2box.config.schema import MODEL_SHAPES, Config, validate
from gpt2box.errors import BadInput
from gpt2box.utils import paths
from gpt2box.utils.files import read_text


def shipped_folder() -> Path:
    """Return the folder of the presets: a checkout's configs/, or where the wheel installs it."""
    checkout = Path(__file__).parents[2] / "configs"
    return checkout if checkout.is_dir() else Path(sysconfig.get_path("data")) / "share/gpt2box/configs"


SHIPPED = shipped_folder()


MOST_CHARACTERS = 1_000_000
MOST_DIGITS = 40  # of a number, as it is written
MOST_NODES = 10_000  # that a file is made of, those that an alias stands for once more counted again


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which plain YAML silently overwrites, and what is of no use in settings."""

    def get_single_data(self) -> Any:
        """What the file says."""
        node = self.get_single_node()
        if node is not None and size_of(node, {}) > MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_NODES:,} values", problem_mark=node.start_mark)
        return None if node is None else self.construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """A number in any notation is made of this text."""
        value = super().construct_scalar(node)
        if node.tag in NUMBERS and len(value) > MOST_DIGITS:
            raise yaml.MarkedYAMLError(problem=f"a number of {len(value):,} digits", problem_mark=node.start_mark)
        if node.tag in NUMBERS and ODD.match(value):
            problem = f"{value}, which YAML takes for another number; write it plainly, or a text in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.MarkedYAMLError(problem="<< is not used in settings", problem_mark=node.start_mark)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.MarkedYAMLError(problem=f"given twice: {', '.join(sorted(twice))}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


# 010 is 8 in YAML 1.1, and 1:30 is 90. Underscores belong between digits, one at a time.
ODD = re.compile(r"[-+]?0[0-9_]|.*(:|__|_$|_\.|\._)")
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def size_of(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values come of it; `known`: of nodes that were counted, each once, however often it stands there."""
    if id(node) not in known:
        known[id(node)] = 1
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(size_of(part, known) for part in parts)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, unchecked.

    Raises:
        BadInput: not readable, not YAML or not a mapping.
    """
    try:
        text = read_text(path)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"{len(text):,} characters")
        values = yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}", "a YAML file of settings") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        why = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise BadInput(f"{path} cannot be read as settings: {why}", "lines such as `block_size: 512`") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}", "lines such as `block_size: 512`")
    return values


def folders() -> list[Path]:
    """Where configs are looked for by name: $GPT2BOX_CONFIGS (mounted into a container), then those that come along."""
    own = os.environ.get("GPT2BOX_CONFIGS")
    return [*([Path(own)] if own else []), SHIPPED]


def shipped() -> list[str]:
    """Names of the configs that need no path."""
    return sorted({path.stem for folder in folders() for path in folder.glob("*.yaml")})


def load(argument: str | None, flags: dict[str, Any]) -> tuple[Config, list[str]]:
    """The settings of a CONFIG argument (see `find`) with flags over them, and notes for the user.

    Raises:
        BadInput: the file or any value is wrong.
    """
    base: dict[str, Any] = {}
    notes: list[str] = []
    path = find(argument) if argument else None
    if path and path.suffix == ".py":
        base, notes = nanogpt.parse(path)
    elif path:
        base = read_yaml(path)
    if not flags.get("dataset"):
        flags = {key: value for key, value in flags.items() if key != "dataset"}  # an empty variable of a script
    values, translated = nanogpt.merge(base, flags, foreign=bool(path and path.suffix == ".py"))
    if isinstance(values.get("dataset"), str):
        values["dataset"] = paths.dataset_name(values["dataset"])
    config = validate(values, str(path or "flags"))
    if flags.get("model") not in (None, config.init_from) and config.init_from in MODEL_SHAPES:
        raise BadInput(
            f"--model {flags['model']} with init_from {config.init_from}, whose weights decide the shape",
            "one of the two",
            f"--init-from {flags['model']}",
        )
    name = config.name or default_name(config, path, base.get("dataset"))
    return config.model_copy(update={"name": paths.checked_name(name, "run")}), notes + translated


def default_name(config: Config, path: Path | None, usual_dataset: str | None) -> str:
    """A run's name where neither the file nor a flag gives one: the file's, with the dataset's if it is another."""
    dataset = Path(config.dataset).name
    if path:
        return path.stem if usual_dataset in (None, config.dataset) else f"{path.stem}-{dataset}"
    start = Path(config.init_from).name if config.init_from != "scratch" else config.model
    return f"{start}-{dataset}"


def find(config: str) -> Path:
    """The file that a CONFIG argument means: a path, or the name of a shipped one.

    Raises:
        BadInput: neither.
    """
    path = Path(config)
    if path.suffix in (".yaml", ".yml", ".py") or "/" in config:
        if path.is_file():
            return path
        raise BadInput(f"no file {config}", f"a YAML file, a nanoGPT config, or one of: {', '.join(shipped())}")
    for folder in folders():
        if (folder / f"{config}.yaml").is_file():
            return folder / f"{config}.yaml"
    near = difflib.get_close_matches(config, shipped(), 1)
    raise BadInput(
        f"no config {config!r}" + (f"; did you mean {near[0]}?" if near else ""),
        f"a YAML file, a nanoGPT config, or one of: {', '.join(shipped())}",
    )


def to_yaml(config: Config) -> str:
    """All settings as resolved, grouped, for the run's own config.yaml."""
    lines: list[str] = []
    group = ""
    for key, field in Config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra["group"] != group:
            group = str(extra["group"])
            lines.append(f"{'' if not lines else chr(10)}# {group}")
        lines.append(yaml.safe_dump({key: getattr(config, key)}, allow_unicode=True, width=1000).rstrip())
    return "\n".join(lines) + "\n"
