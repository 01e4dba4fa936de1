"""Values of options: from the command line, from files of settings, or the defaults.

``[tool.tensormoe]`` in the ``pyproject.toml`` of the current folder stands above the file
``tensormoe.toml`` in the user's config folder. Options by name hold for every command that has
them, those in a table with a command's name for that command.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensormoe.cli._commands import COMMANDS, make_parser
from tensormoe.errors import SpecError

DEFAULT, GIVEN = "default", "command line"
_NO_SETTINGS = ("help", "config", "json")


@dataclass(frozen=True)
class SettingsFile:
    """A file of settings.

    Args:
        path: of the file.
        table: what it says; None if there is none.
    """

    path: Path
    table: Mapping[str, Any] | None


@dataclass(frozen=True)
class Setting:
    """A value in force.

    Args:
        value: as the command line would give it.
        source: ``"command line"``, ``"default"``, or the path of a file.
    """

    value: Any
    source: str


def forget_defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults of a parser's options, which it leaves out from now on: so one sees what is given.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--batch", default="1024")
    >>> forget_defaults(parser), parser.parse_args([])
    ({'batch': '1024'}, Namespace())
    """
    found: dict[str, Any] = {}
    for action in _actions(parser):
        if action.option_strings and action.dest != "help":
            found.setdefault(action.dest, action.default)
            action.default = argparse.SUPPRESS
    return found


def apply(
    command: str,
    parser: argparse.ArgumentParser,
    defaults: Mapping[str, Any],
    given: argparse.Namespace,
) -> argparse.Namespace:
    """Every option of a command, and in ``sources`` where it is from.

    Args:
        command: its name.
        parser: of the command.
        defaults: of its options.
        given: what the command line says.

    Raises:
        SpecError: a file that cannot be read, or that says what no command takes.
    """
    values = {**defaults, **vars(given)}
    sources = dict.fromkeys(defaults, DEFAULT) | dict.fromkeys(vars(given), GIVEN)
    for name, setting in from_files(command, parser, values.get("config")).items():
        if sources[name] == DEFAULT:
            values[name], sources[name] = setting.value, setting.source
    return argparse.Namespace(**values, sources=sources)


def from_files(
    command: str, parser: argparse.ArgumentParser, config: str | None
) -> dict[str, Setting]:
    """Settings of a command in files, by the name that the parser gives them."""
    found = {}
    for file in settings_files(config):
        if file.table:
            _check(file)
        for key, value in _entries(file.table or {}, command):
            action = _options(parser).get(key)
            if action is not None:
                word = _word(action, value, key, file.path)
                found[action.dest] = Setting(word, str(file.path))
    return found


def settings_files(config: str | None) -> list[SettingsFile]:
    """The files that are looked for, the one that wins last.

    Args:
        config: the only file to read, if one is named.

    Raises:
        SpecError: a file that cannot be read.
    """
    if config is not None:
        return [_file(Path(config), needed=True)]
    files = []
    if find_spec("platformdirs") is not None:
        from platformdirs import user_config_path

        files.append(user_config_path("tensormoe", appauthor=False) / "tensormoe.toml")
    return [_file(path) for path in (*files, Path("pyproject.toml"))]


def option_name(arguments: argparse.Namespace, name: str) -> str:
    """An option in errors, with the file that says so."""
    source = arguments.sources.get(name, GIVEN)
    option = f"--{name.replace('_', '-')}"
    return option if source in (DEFAULT, GIVEN) else f"{option} in {source}"


def with_source(message: str, arguments: argparse.Namespace) -> str:
    """An error of an option, with the file that sets it.

    >>> arguments = argparse.Namespace(sources={"epochs": "tensormoe.toml"})
    >>> with_source("--epochs must be a positive integer; got 'x'.", arguments)
    "--epochs in tensormoe.toml must be a positive integer; got 'x'."
    """
    option = message.split(" ")[0].rstrip(":")
    name = option.removeprefix("--").replace("-", "_")
    if not option.startswith("--") or name not in arguments.sources:
        return message
    named = option_name(arguments, name)
    return message if message.startswith(named) else named + message.removeprefix(option)


def _file(path: Path, needed: bool = False) -> SettingsFile:
    import tomllib

    content: Any
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if needed:
            raise SpecError(
                f"--config must be a file; {str(path)!r} does not exist. Name another one."
            ) from None
        return SettingsFile(path, None)
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{str(path)!r} can't be read as TOML: {error}. Mend it, or name another file with "
            "--config."
        ) from None
    if path.name == "pyproject.toml":
        tools = content.get("tool")
        content = tools.get("tensormoe") if isinstance(tools, dict) else None
    if content is not None and not isinstance(content, dict):
        raise SpecError(f"tool.tensormoe in {str(path)!r} must be a table; got {content!r}.")
    return SettingsFile(path, content)


def _entries(table: Mapping[str, Any], command: str) -> Iterator[tuple[str, Any]]:
    """Options with their values: those of every command first, so that a command's own win."""
    own = table.get(command, {})
    for entries in (table, own if isinstance(own, Mapping) else {}):
        for key, value in entries.items():
            if not isinstance(value, Mapping):
                yield key.replace("_", "-"), value


def _check(file: SettingsFile) -> None:
    """Refuse keys that no command has."""
    known = {name: _options(parser) for name, parser in make_parser(COMMANDS)[1].items()}
    every = {key for options in known.values() for key in options}
    for key, value in (file.table or {}).items():
        if isinstance(value, Mapping):
            _refuse(file, [key], COMMANDS, "commands")
            _refuse(file, value, known[key], f"options of {key}")
        else:
            _refuse(file, [key], every, "options of a command")


def _refuse(
    file: SettingsFile, keys: Sequence[str] | Mapping[str, Any], known: Any, what: str
) -> None:
    for key in keys:
        if key.replace("_", "-") not in known:
            raise SpecError(
                f"keys in {str(file.path)!r} must be {what}; got {key!r}. Drop it, or see: "
                "tensormoe config"
            )


def _word(action: argparse.Action, value: Any, key: str, path: Path) -> Any:
    """A value as the command line would give it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise SpecError(f"{key} in {str(path)!r} must be true or false; got {value!r}.")
        return value
    listed = value if isinstance(value, list) else [value]
    several = isinstance(action, argparse._AppendAction)
    plain = all(isinstance(each, str | int | float) for each in listed)
    if not plain or any(isinstance(each, bool) for each in listed) or len(listed) > 1 > several:
        raise SpecError(
            f"{key} in {str(path)!r} must be a text or a number"
            f"{', or a list of them' if several else ''}; got {value!r}."
        )
    words = [str(each) for each in listed]
    return words if several else words[0]


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options that files may set, by name; of a switch, the name that turns it on."""
    return {
        action.option_strings[0].removeprefix("--"): action
        for action in _actions(parser)
        if action.option_strings
        and action.option_strings[0].removeprefix("--") not in _NO_SETTINGS
        and action.dest not in _NO_SETTINGS
    }


def _actions(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    # argparse has no public list of them
    return parser._actions
