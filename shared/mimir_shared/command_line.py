"""What both programs do alike on the command line: options with - or _, errors as one line, exit codes."""

import logging
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable
from types import TracebackType

import typer

from mimir_shared.errors import MimirError
from mimir_shared.redaction import hide_secrets

_UNSEEN = frozenset(("Cc", "Cs"))
"""Unicode's categories of control characters and of lone surrogates, which cannot be written either."""


def make_app(help_text: str) -> typer.Typer:
    """A typer app whose long options may be written with dashes or underscores."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={
            "token_normalize_func": lambda name: name.replace("_", "-"),
            "help_option_names": ["-h", "--help"],
        },
    )


def run_app(app: Callable[[], object]) -> None:
    """Run the program; a MimirError ends it with one line and its own exit code.

    No secret is quoted: neither in that line, nor in the traceback of a fault of ours.
    """
    sys.excepthook = _print_traceback
    quiet_libraries()
    try:
        app()
    except MimirError as error:
        sys.stderr.write(f"error: {visible(hide_secrets(str(error)))}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # the reader of our output (head, less) left: that is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def quiet_libraries() -> None:
    """Let libraries keep to themselves what nobody has asked for; in every process that loads models."""
    # diffusers loads it wherever it is installed, and it tells at length what it lacks
    logging.getLogger("xformers").setLevel(logging.ERROR)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(hide_secrets("".join(traceback.format_exception(kind, error, trace))))


def echo(text: str = "") -> None:
    """Print lines of result to stdout."""
    sys.stdout.write(visible(text) + "\n")


def visible(text: str) -> str:
    """A text that leaves the terminal as it is: captions and names may hold sequences that recolour or rename it."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNSEEN else ascii(c)[1:-1] for c in text)
