"""Commands of ours that take another command behind `--`."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["WithCommand", "command_of"]

_COMMAND = "kohakuriver.command"


class WithCommand(TyperCommand):
    """Takes everything behind `--` as a command, so that it can't be mistaken for more arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta[_COMMAND] = args[at + 1 :]
            args = args[:at]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- CMD...]"]


def command_of(ctx: typer.Context) -> list[str] | None:
    """What stood behind `--`, None where there was none."""
    command: list[str] | None = ctx.meta.get(_COMMAND)
    return command
