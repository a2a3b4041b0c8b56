"""What all groups and commands of ours have in common: how a command line is read, and how it is shown."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from kohakuriver.cli import output
from kohakuriver.cli.aliases import WithAliases
from kohakuriver.errors import no_text

__all__ = ["App", "Command"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command whose arguments are text, and whose usage line is written as in docs/cli.md."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        # The source's lines end where they do; the terminal is as wide as it is.
        self.help = self.help and re.sub(r"(?<!\n)\n(?!\n)", " ", self.help)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises UsageError for bytes that are no text: what is ours goes into JSON, URLs and files.

        This is the one place where they could get in. What another program is given is kept out of `args`.
        """
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        output.errors_as_json("--json" in args and any("--json" in each.opts for each in self.params))
        _check_texts(args, "arguments")
        left = super().parse_args(ctx, args)
        _check_texts(_texts_in(list(ctx.params.values())), "settings")  # variables stand for options, too
        _make_paths(self.params, ctx.params)
        return left

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(_usage(each) for each in self.params if each.param_type_name == "argument")]

    def get_params(self, ctx: Any) -> list[Any]:
        return _described(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _cut_nothing()
        super().format_help(ctx, formatter)


def _cut_nothing() -> None:
    """Have what is too long for its column in a help go on in the next line: the end of a name is cut otherwise."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.table import Table
    from typer import rich_utils

    class Whole(Table):
        def add_row(self, *cells: Any, **_: Any) -> None:
            # Columns are tables of their own, which would cut.
            super().add_row(*(Group(*each.renderables) if isinstance(each, Columns) else each for each in cells))
            for column in self.columns:
                column.overflow = "fold"

    # Ranges take room that the words beside them need.
    vars(rich_utils).update(Table=Whole, RANGE_STRING="")


def _described(params: list[Any]) -> list[Any]:
    """These parameters, which say in words of people what they take."""
    for each in params:
        kind = type(each.type).__name__
        if each.param_type_name == "argument":
            each.type = copy.copy(each.type)  # parameters have the simple ones together
            each.type.get_metavar = _nothing  # the usage line has its name, and it is text
        elif getattr(each, "is_flag", False):
            each.metavar = ""  # takes no value, so there is none to be described
        elif each.metavar is None and not kind.endswith("Choice"):
            each.metavar = _kind(each, kind)
    return params


def _make_paths(params: list[Any], given: dict[str, Any]) -> None:
    """Have paths among what was given be paths: Typer makes them only for those that a command's function names."""
    for each in params:
        value = given.get(each.name)
        if value is not None and type(each.type).__name__.endswith("Path"):
            given[each.name] = [Path(part) for part in value] if isinstance(value, (list, tuple)) else Path(value)


def _nothing(*_: Any, **__: Any) -> str:
    """What stands beside a name where nothing is to be said of its type."""
    return ""


def _kind(option: Any, kind: str) -> str:
    """What a value of an option is, for people: a type of Python's says nothing to them."""
    if kind.endswith("Path"):
        return "PATH"
    if kind.startswith(("Int", "Float")):
        return "N"
    return str(option.name.rpartition("_")[2].upper())


def _usage(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()) + ("" if argument.nargs == 1 else "...")
    return name if argument.required else f"[{name}]"


def _check_texts(words: Sequence[str], what: str) -> None:
    for word in words:
        if any("\udc80" <= character <= "\udcff" for character in word):
            raise no_text(word, what)


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in _texts_in(each)]
    return [str(value)] if isinstance(value, (str, os.PathLike)) else []


class _Group(WithAliases):
    def get_params(self, ctx: Any) -> list[Any]:
        return _described(super().get_params(ctx))


class App(typer.Typer):
    """A group of our commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, **settings)

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **settings: Any
    ) -> Callable[[Function], Function]:
        return super().command(name, cls=cls or Command, **settings)
