"""One dataclass per command becomes its options, its YAML file and its help."""

import contextlib
import io
import re
import typing
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter

from weightshare.errors import UserError


def dashed(name: str) -> str:
    """The option a person types for a field: ``cure.learning_rate`` -> ``cure-learning-rate``."""
    return name.replace(".", "-").replace("_", "-")


class _Help(DefaultHelpFormatter):
    """Help in which options are spelled with dashes and the usage fits on one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 34})

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        places = [action.dest.upper() for action in actions if not action.option_strings]
        super().add_usage(" ".join([self._prog, *places, "[options]"]), (), (), prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # Examples are lines to copy; anything else may be wrapped.
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)

    def _format_action_invocation(self, action: Any) -> str:
        if not action.option_strings:
            return action.dest.upper()
        names = ", ".join(
            f"--{dashed(o[2:])}" if o[:2] == "--" else o for o in action.option_strings
        )
        if action.nargs == 0 or action.dest in ("help",) or "print_config" in action.dest:
            return names
        hint = getattr(action, "_typehint", None)
        if hint is bool:
            return names
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices:
            return f"{names} {{{','.join(map(str, choices))}}}"
        return f"{names} {dashed(action.dest.split('.')[-1]).upper()}"


def build(command: str, says: str, config: type, examples: str) -> ArgumentParser:
    """The parser of one command."""
    parser = ArgumentParser(
        prog=f"weightshare {command}",
        description=f"{says[0].upper()}{says[1:]}.",
        epilog="examples:\n" + examples.strip("\n"),
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="read options from a YAML file like config.yaml"
    )
    parser.add_class_arguments(config, as_positional=True)
    return parser


def parse(
    command: str, says: str, config: str, examples: str, arguments: Sequence[str]
) -> Any | None:
    """Options as an instance of the command's dataclass; None when only help was asked for.

    Raises:
        UserError: an option that does not exist, or a value that does not fit.
    """
    module, name = config.split(":")
    config_class = getattr(import_module(module), name)
    parser = build(command, says, config_class, examples)
    printed = io.StringIO()
    try:
        # jsonargparse prints its usage with every error; a sentence is enough.
        with contextlib.redirect_stderr(printed):
            values = parser.parse_args(_translated(parser, command, arguments))
    except ArgumentError as error:
        raise UserError(_reworded(str(error), command)) from error
    except SystemExit as stop:
        if stop.code:
            raise UserError(_reworded(printed.getvalue(), command)) from stop
        return None
    values.pop("config", None)
    return config_class(**vars(parser.instantiate(values)))


def _translated(parser: ArgumentParser, command: str, arguments: Sequence[str]) -> list[str]:
    """Dashed options as jsonargparse knows them; a bare flag becomes ``=true``."""
    names: dict[str, Any] = {}
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                names[dashed(option[2:])] = (option, action)
    result, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            result.append(word)
            continue
        typed, equals, value = word[2:].partition("=")
        key = dashed(typed)
        if key.startswith("no-") and key not in names and key[3:] in names and not equals:
            result.append(f"{names[key[3:]][0]}=false")
            continue
        if key not in names:
            close = [n for n in names if n.startswith(key) or key in n][:3]
            raise UserError(
                f"--{typed} is not an option of {command}"
                + (f"; did you mean --{' or --'.join(close)}?" if close else "")
                + (";" if not close else "")
                + f" weightshare {command} --help lists them."
            )
        option, action = names[key]
        if equals:
            result.append(f"{option}={value}")
        elif getattr(action, "_typehint", None) is bool:
            explicit = bool(rest) and rest[0].lower() in ("true", "false")
            result.append(f"{option}={rest.pop(0).lower() if explicit else 'true'}")
        elif action.nargs == 0 or "print_config" in option:
            result.append(option)
        else:
            # Joined with =, so that a value may begin with a dash (--learning-rate -1).
            if not rest:
                raise UserError(f"--{key} needs a value; weightshare {command} --help explains it.")
            result.append(f"{option}={rest.pop(0)}")
    return result


_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}


def _reworded(message: str, command: str) -> str:
    """jsonargparse's message as one sentence in the words of the command line."""
    text = " ".join(message.split("error:", 1)[-1].split())
    hint = f"weightshare {command} --help explains the options."
    if found := re.search(r"arguments are required: ([\w., ]+)", text):
        return f"{found.group(1).upper()} is missing; {hint}"
    if found := re.search(r"[Uu]nrecognized arguments: (\S+)", text):
        return f"{found.group(1)!r} is not expected here; {hint}"
    if found := re.search(r"Option '(.+?)' is not accepted", text):
        return f"The configuration has the option {found.group(1)!r}, which does not exist; {hint}"
    if found := re.search(r"File does not exist: '(.+?)'", text):
        return f"There is no file {found.group(1)} to read options from; {hint}"
    key = re.search(r'key "([^"]+)"', text)
    got = re.search(r"(?:Got value|Given value): (.+)$", text)
    if key and got:
        value = f"--{dashed(key.group(1))} cannot be {got.group(1)}"
        if choices := re.search(r"Literal\[(.+?)\]", text):
            *most, last = re.findall(r"'([^']*)'", choices.group(1))
            return f"{value}; it takes {', '.join(most)} or {last}. {hint}"
        kind = next((k for k in re.findall(r"<class '(\w+)'>", text) if k in _KINDS), None)
        if kind:
            return f"{value}; it takes {_KINDS[kind]}. {hint}"
    return f"The options cannot be read: {text} {hint}"
