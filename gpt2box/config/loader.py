"""Load settings: defaults, then a config file, then flags; the later ones win."""

import difflib
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from gpt2box.config import nanogpt
from gpt2box.config.schema import MODEL_SHAPES, Config
from gpt2box.config.validation import validate
from gpt2box.errors import BadInput
from gpt2box.utils import paths
from gpt2box.utils.files import read_text


def find_presets_dir() -> Path:
    """Return the folder of the presets: a checkout's configs/, or where the wheel installs it."""
    checkout = Path(__file__).parents[2] / "configs"
    return checkout if checkout.is_dir() else Path(sysconfig.get_path("data")) / "share/gpt2box/configs"


PRESETS_DIR = find_presets_dir()

MAX_CHARACTERS = 1_000_000
MAX_DIGITS = 40  # of a number
MAX_VALUES = 10_000  # in a file, with those that aliases repeat


class SettingsLoader(yaml.SafeLoader):
    """Load YAML strictly: reject duplicate keys, which YAML silently overwrites, merge keys and odd numbers."""

    def get_single_data(self) -> Any:
        """Load the document, unless its aliases expand to too many values."""
        node = self.get_single_node()
        if node is not None and count_values(node, {}) > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES:,} values", problem_mark=node.start_mark)
        return None if node is None else self.construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Load a scalar; reject numbers that are too long or mean another number in YAML 1.1."""
        value = super().construct_scalar(node)
        if node.tag in NUMBER_TAGS and len(value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(problem=f"a number of {len(value):,} digits", problem_mark=node.start_mark)
        if node.tag in NUMBER_TAGS and AMBIGUOUS_NUMBER.match(value):
            problem = f"{value}, which YAML reads as another number; write the number plainly, or a text in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Load a mapping; reject merge keys and duplicate keys."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.MarkedYAMLError(problem="<< is not used in settings", problem_mark=node.start_mark)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.MarkedYAMLError(problem=f"given twice: {', '.join(sorted(twice))}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


# 010 is 8 in YAML 1.1, and 1:30 is 90. Underscores belong between digits, one at a time.
AMBIGUOUS_NUMBER = re.compile(r"[-+]?0[0-9_]|.*(:|__|_$|_\.|\._)")
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values below a node, counting an alias as often as it occurs. `known` caches counts by node id."""
    if id(node) not in known:
        known[id(node)] = 1
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(count_values(part, known) for part in parts)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file's settings, unchecked. Raises BadInput: the file is not readable, not YAML or not a mapping."""
    try:
        text = read_text(path)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(text):,} characters")
        values = yaml.load(text, SettingsLoader)
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


def config_dirs() -> list[Path]:
    """Return the folders of named configs: $GPT2BOX_CONFIGS (mounted into a container), then the presets."""
    own = os.environ.get("GPT2BOX_CONFIGS")
    return [*([Path(own)] if own else []), PRESETS_DIR]


def list_presets() -> list[str]:
    """Return the names of the configs that need no path."""
    return sorted({path.stem for folder in config_dirs() for path in folder.glob("*.yaml")})


def load_config(argument: str | None, flags: dict[str, Any]) -> tuple[Config, list[str]]:
    """Load the settings of a CONFIG argument and flags. Returns them and notes for the user.

    Raises BadInput: the file or a value is invalid.
    """
    base: dict[str, Any] = {}
    notes: list[str] = []
    path = find_config_file(argument) if argument else None
    if path and path.suffix == ".py":
        base, notes = nanogpt.parse_config_file(path)
    elif path:
        base = read_yaml(path)
    if not flags.get("dataset"):
        flags = {key: value for key, value in flags.items() if key != "dataset"}  # an unset variable of a script
    values, translated = nanogpt.merge_settings(base, flags, foreign=bool(path and path.suffix == ".py"))
    if isinstance(values.get("dataset"), str):
        values["dataset"] = paths.dataset_name(values["dataset"])
    config = validate(values, str(path or "flags"))
    if flags.get("model") not in (None, config.init_from) and config.init_from in MODEL_SHAPES:
        raise BadInput(
            f"--model {flags['model']} with init_from {config.init_from}, whose weights decide the shape",
            "one of the two",
            f"--init-from {flags['model']}",
        )
    name = config.name or default_run_name(config, path, base.get("dataset"))
    return config.model_copy(update={"name": paths.validate_name(name, "run")}), notes + translated


def default_run_name(config: Config, path: Path | None, usual_dataset: str | None) -> str:
    """Return the default run name: the file's name, with the dataset's if it is not the file's own."""
    dataset = Path(config.dataset).name
    if path:
        return path.stem if usual_dataset in (None, config.dataset) else f"{path.stem}-{dataset}"
    start = Path(config.init_from).name if config.init_from != "scratch" else config.model
    return f"{start}-{dataset}"


def find_config_file(config: str) -> Path:
    """Find the file of a CONFIG argument: a path, or the name of a preset.

    Raises BadInput: there is no such file or preset.
    """
    path = Path(config)
    if path.suffix in (".yaml", ".yml", ".py") or "/" in config:
        if path.is_file():
            return path
        raise BadInput(f"no file {config}", f"a YAML file, a nanoGPT config, or one of: {', '.join(list_presets())}")
    for folder in config_dirs():
        if (folder / f"{config}.yaml").is_file():
            return folder / f"{config}.yaml"
    near = difflib.get_close_matches(config, list_presets(), 1)
    raise BadInput(
        f"no config {config!r}" + (f"; did you mean {near[0]}?" if near else ""),
        f"a YAML file, a nanoGPT config, or one of: {', '.join(list_presets())}",
    )


def config_to_yaml(config: Config) -> str:
    """Format all resolved settings, grouped, for the run's config.yaml."""
    lines: list[str] = []
    group = ""
    for key, field in Config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra["group"] != group:
            group = str(extra["group"])
            lines.append(f"{'' if not lines else chr(10)}# {group}")
        lines.append(yaml.safe_dump({key: getattr(config, key)}, allow_unicode=True, width=1000).rstrip())
    return "\n".join(lines) + "\n"
