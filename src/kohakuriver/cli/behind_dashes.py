"""Commands of ours that end in another program's words: a command behind `--`, or what is for ssh."""

from __future__ import annotations

import shlex
from typing import Any

import typer
from typer.core import TyperCommand

from kohakuriver.errors import UsageError

__all__ = ["WithCommand", "WithSshArguments", "command_of"]

_COMMAND = "kohakuriver.command"


class WithCommand(TyperCommand):
    """Takes everything behind `--` as a command, so that it can't be mistaken for more arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta[_COMMAND] = args[at + 1 :]
            args = args[:at]
        ctx.allow_extra_args = True
        left = super().parse_args(ctx, args)
        if left and not ctx.resilient_parsing:
            raise UsageError(self.misplaced(ctx, left))
        return left

    def misplaced(self, ctx: Any, words: list[str]) -> str:
        """What to say to whoever gave `words` that no argument of this command is for."""
        given = [str(ctx.params[each.name]) for each in self.params if each.param_type_name == "argument"]
        return f"A command stands behind --: {shlex.join([*ctx.command_path.split(), *given])} -- {shlex.join(words)}"

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- CMD...]"]


def command_of(ctx: typer.Context) -> list[str] | None:
    """What stood behind `--`, None where there was none."""
    command: list[str] | None = ctx.meta.get(_COMMAND)
    return command


class WithSshArguments(TyperCommand):
    """Takes its own options on either side of the first argument; from the first other word on all is for ssh."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before = self._own(args)
        task = args[before : before + 1]
        behind = before + 1 + self._own(args[before + 1 :])
        if task and task[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"{task[0]} is no option of this command; an option of ssh stands behind the task.")
        theirs = args[behind:]
        return super().parse_args(ctx, [*args[:before], *args[before + 1 : behind], "--", *task, *theirs])

    def _own(self, words: list[str]) -> int:
        """How many of `words`, from the first one on, are options of this command with their values."""
        flags = {name: bool(getattr(each, "is_flag", False)) for each in self.params for name in each.opts}
        flags["--help"] = True
        at = 0
        while at < len(words) and words[at].startswith("--"):
            name, equals, _ = words[at].partition("=")
            if name not in flags:
                break
            at += 1 if equals or flags[name] else 2
        return min(at, len(words))
