"""Kinds of options for the command line: ranges, and one option for each setting."""

from typing import Any

import click


def normalize_option_name(name: str) -> str:
    """Option names with underscores are the same as with dashes, as nanoGPT's users type them."""
    return name.replace("_", "-")


class FiniteRange(click.FloatRange):
    """A range that NaN is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


class IndexRange(click.ParamType):  # type: ignore[type-arg] # generic in the newest click only
    """Two numbers, such as 0:40."""

    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        first, colon, last = str(value).partition(":")
        whole = all(part.isdecimal() and len(part) < 10 for part in (first, last))
        if not (colon and whole and int(first) < int(last)):
            self.fail(f"{value!r} is not two numbers such as 0:40, the second not included.", param, ctx)
        return int(first), int(last)


class SettingsCommand(click.Command):
    """A command with one option for each setting (config/schema.py), and nanoGPT's names for them, hidden."""

    def __init__(self, *args: Any, show_settings: bool = True, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.show_settings = show_settings

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from gpt2box.config.nanogpt import NANOGPT_FLAGS
        from gpt2box.config.schema import Config, describe_setting

        options: list[click.Parameter] = []
        for key in Config.model_fields:
            meaning, values, default = describe_setting(key)
            text = meaning + (f" [{default}]" if default else "")
            names, hidden = [f"--{normalize_option_name(key)}", key], not self.show_settings
            options.append(click.Option(names, help=text, metavar=values, hidden=hidden))
        options += [
            click.Option([f"--{normalize_option_name(key)}", key], hidden=True)
            for key in NANOGPT_FLAGS
            if key not in Config.model_fields
        ]
        arguments = super().get_params(ctx)
        return arguments[:-1] + options + arguments[-1:]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--eval-only` alone means true, whatever follows."""
        from gpt2box.config.schema import Config

        switches = {
            f"--{normalize_option_name(key)}" for key, field in Config.model_fields.items() if field.annotation is bool
        }
        values = ("true", "false", "True", "False", "1", "0")
        for index, arg in enumerate(args):
            if normalize_option_name(arg) in switches and (index + 1 == len(args) or args[index + 1] not in values):
                args[index] = f"{arg}=true"
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from gpt2box.config.schema import Config

        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Argument):
                continue  # said in the text above
            record = parameter.get_help_record(ctx)
            field = Config.model_fields.get(parameter.name or "")
            extra = field.json_schema_extra if field else None
            group = str(extra["group"]) if isinstance(extra, dict) else "Options"
            if record:
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
