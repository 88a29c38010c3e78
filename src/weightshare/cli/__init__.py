"""The command line: ``weightshare COMMAND``. One file per command, read as the method's story.

A command file has ``CONFIG`` ("module:Dataclass", standard library only), ``EXAMPLES`` and
``run(config)``; what is heavy is imported inside ``run``.
"""

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from weightshare.errors import UserError

COMMANDS = {
    "tour": "every system on real data, small; ends in a table and a report",
    "fold": "make a language model smaller: rank, remove, share, cure, save",
    "federate": "train a federation in which contribution earns the model",
    "points": "train an equivariant network on points: N-body, a potential on atoms, QM9",
    "tune": "fine-tune a language model with a small adapter: shards, LoRA or any PEFT method",
    "audit": "who shares which weight, do they agree, what would it buy to unshare",
    "evaluate": "loss, bits per byte, zero-shot tasks, speed and size of a language model",
    "export": "turn what a run made into a format for elsewhere",
}
"""Commands in the order of the help, with what each does."""

EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for input that cannot be used, 1 for a bug."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"weightshare: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("weightshare: interrupted; the same command with --resume goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (as in `weightshare fold --help | head`).
        sys.stderr.close()
        return 0
    except Exception:
        traceback.print_exc()
        print("weightshare: this is a bug; please report it with the lines above", file=sys.stderr)
        return EXIT_BUG


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        from weightshare import __version__

        print(f"weightshare {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(
            f"{name!r} is not a command; use one of {', '.join(COMMANDS)}, "
            "or --help for what they do."
        )
    from weightshare.cli.options import parse

    command = import_module(f"weightshare.cli.{name}")
    config = parse(name, COMMANDS[name], command.CONFIG, command.EXAMPLES, arguments[1:])
    if config is None:
        return 0
    try:
        command.run(config)
    except ModuleNotFoundError as error:
        _missing_extra(error, getattr(command, "EXTRA", "all"))
    return 0


def _missing_extra(error: ModuleNotFoundError, extra: str) -> None:
    """Say which extra brings a missing package; our own missing modules stay bugs."""
    package = (error.name or "").split(".")[0]
    if not package or package == "weightshare":
        raise error
    raise UserError(
        f"This command needs the package {package}, which is not installed; "
        f"install it with: pip install 'weightshare[{extra}]'."
    ) from error


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {says}" for name, says in COMMANDS.items()]
    return "\n".join(
        [
            "weightshare: find where weights can serve more than one use, share them, measure it.",
            "",
            "usage: weightshare COMMAND [options]",
            "",
            *lines,
            "",
            "weightshare COMMAND --help explains a command and shows examples.",
            "Begin with: weightshare tour",
        ]
    )
