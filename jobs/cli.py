"""From a command line to a function of `commands.py`, and from whatever happens to an exit code.

Nothing heavy is imported here: ``scarcade --help`` must not wait for torch. Errors end in one message on stderr
that begins with ``error:`` (`exits.py`). A TOML file given by --config may hold every option of a command: the direct
ones at its top, the fields of sections in tables; the command line wins.
"""

import atexit
import difflib
import gc
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cyclopts import CycloptsError, UnusedCliTokensError
from cyclopts.config import Dict

from scarcade.engine import ahead
from scarcade.engine.errors import UsageError
from scarcade.engine.tables import merged, nested, read_toml
from scarcade.jobs.commands import app
from scarcade.jobs.console import note, only_our_warnings
from scarcade.jobs.exits import explained, stop_tidily_on_sigterm
from scarcade.jobs.head_start import head_start, value
from scarcade.jobs.options import DIRECT, UNCHECKED, WITH_SECTIONS, Sections, sections_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code is returned, and is that of the process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv
    try:
        stop_tidily_on_sigterm()
        only_our_warnings(debug)
        return run(argv)
    except BrokenPipeError:  # the reader of our output is gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except CycloptsError as error:
        return _failed(UsageError(_told(error, argv[0])), debug)
    except SystemExit as error:  # what a job raises after it stopped tidily at SIGTERM
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # noqa: BLE001  (everything that ends a command is told in our way)
        return _failed(error, debug)
    finally:
        with suppress(KeyboardInterrupt):
            ahead.end()


def _told(error: CycloptsError, command: str) -> str:
    """What is wrong with a command line, in one line."""
    if isinstance(error, UnusedCliTokensError):
        words = ", ".join(repr(word) for word in error.unused_tokens or ())
        return f"{command} does not take {words}: see scarcade {command} --help"
    return _one_line(str(error))


def run(argv: list[str]) -> int:
    """As `main`, with exceptions.

    Raises:
        CycloptsError, UsageError: the command line or the TOML file cannot be meant.
    """
    command = argv[0] if argv and argv[0] in app else ""
    if {"--help", "-h"} & set(argv) or not command:
        return _help(argv, command)
    head_start(argv)
    gc.disable()  # nothing that an import makes is ever garbage, and to look for it takes a tenth of the start
    try:
        function, bound, _ = parsed(argv)
    finally:
        gc.freeze()  # nor later
        gc.enable()
        atexit.register(gc.freeze)  # nor when the process ends: Python would look through all modules again
    return int(function(*bound.args, **bound.kwargs) or 0)


def parsed(argv: list[str]) -> tuple[Callable[..., Any], inspect.BoundArguments, Path | None]:
    """(function of a command, its arguments, the TOML file that some of them come from); nothing is run.

    Raises:
        CycloptsError, UsageError: the command line or the TOML file cannot be meant.
    """
    command = argv[0]
    config, argv = _config_of(argv)
    tables: dict[str, Any] = {}
    app.config = ()
    if command in WITH_SECTIONS:
        from scarcade.jobs.settings import check_tables, overrides, settings_of, split

        argv, pairs = split(argv)
        direct, tables = _parts_of(config, command)
        known = settings_of(sections_of(command, _model_of(argv, direct)))
        apart = {name: tables.pop(name) for name in UNCHECKED.get(command, ()) if name in tables}
        check_tables(tables, known, command, f"--config {config}")
        given = overrides(pairs, known, command)
        for name, dotted in DIRECT.items():
            if name in direct and dotted in {key for key in known if _has(tables, key)}:
                raise UsageError(f"--config {config}: {name} and [{dotted.replace('.', '] ')} are one setting")
            if dotted in given:
                direct.pop(name, None)
        sections = Sections({**merged(tables, nested(given)), **apart}, frozenset(given))
    else:
        direct, tables = _parts_of(config, command)
        if tables:
            raise UsageError(f"--config {config}: `{command}` takes no table [{next(iter(tables))}]")
        sections = Sections()
    if config is not None:
        _check_direct(direct, command, config)
        app.config = (Dict(direct, source=str(config), use_commands_as_keys=False),)
    function, bound, unparsed = app.parse_args(argv, exit_on_error=False, print_error=False)
    if "sections" in unparsed:
        bound.arguments["sections"] = sections
    return function, bound, config


def _help(argv: list[str], command: str) -> int:
    """--help, --version, no command at all, or one that does not exist."""
    function, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
    function(*bound.args, **bound.kwargs)
    if command in WITH_SECTIONS:
        from scarcade.jobs.settings import help_text, settings_of

        known = settings_of(sections_of(command, _model_of(argv, {})))
        print("Every field of its sections can be set too, here or in the tables of the TOML file:")
        print(help_text(known, shutil.get_terminal_size().columns))
    return 0


def _config_of(argv: list[str]) -> tuple[Path | None, list[str]]:
    """The file given by --config, and `argv` without it."""
    rest, found = [], None
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            rest += [token, *tokens]
            break
        if token != "--config" and not token.startswith("--config="):
            rest.append(token)
            continue
        if found is not None:
            raise UsageError("--config: given twice")
        if "=" not in token and not tokens:
            raise UsageError("--config: wants a TOML file")
        found = Path(token.partition("=")[2] if "=" in token else tokens.pop(0))
    return found, rest


def _parts_of(config: Path | None, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(direct options by their names with dashes, tables) of the TOML file.

    ``[model] name = "scvi"`` is --model, because TOML has no room for ``model = "scvi"`` beside a table [model].
    """
    raw = read_toml(config) if config is not None else {}
    direct = {key.replace("_", "-"): value for key, value in raw.items() if not isinstance(value, dict)}
    tables = {key: dict(value) for key, value in raw.items() if isinstance(value, dict)}
    if command in ("train", "tune") and "name" in tables.get("model", {}):
        direct["model"] = tables["model"].pop("name")
    return direct, tables


def _check_direct(direct: Mapping[str, Any], command: str, config: Path) -> None:
    known = {
        name.removeprefix("--") for argument in app[command].assemble_argument_collection() for name in argument.names
    }
    for key in direct:
        if key not in known or key in ("config", "debug"):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"--config {config}: `scarcade {command}` has no option {key!r}{hint}")


def _model_of(argv: Sequence[str], direct: Mapping[str, Any]) -> str:
    """The value of --model, or the model that --update names: which fields there are depends on it."""
    name = value(argv, "model") or direct.get("model")
    if name is None and (reference := value(argv, "update") or direct.get("update")) is not None:
        try:
            name = json.loads((Path(str(reference)) / "model.json").read_text())["model"]
        except (OSError, ValueError, KeyError, TypeError):
            name = None  # the command itself says what is wrong with it
    return str(name or "scvi")


def _has(tables: Mapping[str, Any], dotted: str) -> bool:
    section, _, name = dotted.partition(".")
    return name in {key.replace("_", "-") for key in tables.get(section, {})}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _failed(error: BaseException, debug: bool) -> int:
    """Tell the error on stderr; its exit code."""
    code, message = explained(error)
    if debug:
        import traceback

        traceback.print_exception(error)
    note(f"error: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
