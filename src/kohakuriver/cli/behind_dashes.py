"""Commands of ours that end in another program's words: a command, mostly behind `--`, or what is for ssh."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from kohakuriver.cli.app import Command
from kohakuriver.errors import UsageError

__all__ = ["BehindTask", "WithCommand", "WithSshArguments", "command_of"]

_COMMAND = "kohakuriver.command"


class WithCommand(Command):
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
    """The command that was given, None where there was none."""
    command: list[str] | None = ctx.meta.get(_COMMAND)
    return command


class BehindTask(Command):
    """Takes its own options on either side of the task; from the first other word behind it on all is a command.

    A `--` before that word is not needed, and does no harm.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before = self._own(ctx, args)
        task = args[before : before + 1]
        behind = before + 1 + self._own(ctx, args[before + 1 :])
        ours, theirs = [*args[:before], *args[before + 1 : behind]], args[behind:]
        if task[:1] == ["--"]:
            task, theirs = [], []
        return self.parse_apart(ctx, ours, task, theirs)

    def parse_apart(self, ctx: Any, ours: list[str], task: list[str], theirs: list[str]) -> list[str]:
        """Parse our options and the task, none or one word, and keep what is another program's."""
        if theirs and theirs[0] != "--" and theirs[0].startswith("-"):
            return super().parse_args(ctx, [*ours, *task, *theirs[:1]])  # says that there is no such option
        if theirs:
            ctx.meta[_COMMAND] = theirs[1:] if theirs[0] == "--" else theirs
        return super().parse_args(ctx, [*ours, *task])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[CMD...]"]

    def _own(self, ctx: Any, words: list[str]) -> int:
        """How many of `words`, from the first one on, are options of this command with their values."""
        at = 0
        while at < len(words) and (length := self.length_of_option(ctx, words[at])):
            at += length
        return min(at, len(words))

    def length_of_option(self, ctx: Any, word: str) -> int:
        """How many words an option of ours that begins with `word` is long; 0 where that is none."""
        flags = {name: bool(getattr(each, "is_flag", False)) for each in self.get_params(ctx) for name in each.opts}
        flags |= {name: True for each in self.get_params(ctx) for name in each.secondary_opts}
        flags = {name: flag for name, flag in flags.items() if name.startswith("-")}
        name, equals, _ = word.partition("=")
        if name in flags:
            return 1 if equals or flags[name] else 2
        short = [f"-{letter}" for letter in word[1:]] if word[:1] == "-" != word[1:2] else []
        ours = bool(short) and (flags.get(short[0]) is False or all(flags.get(each) for each in short))
        return 1 if ours else 0


class WithSshArguments(BehindTask):
    """The same, where all from the first other word on is for ssh: its options, and perhaps a command."""

    def parse_apart(self, ctx: Any, ours: list[str], task: list[str], theirs: list[str]) -> list[str]:
        if task and task[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"{task[0]} is no option of this command; an option of ssh stands behind the task.")
        ctx.meta[_COMMAND] = theirs
        return Command.parse_args(self, ctx, [*ours, *task])

    def length_of_option(self, ctx: Any, word: str) -> int:
        return super().length_of_option(ctx, word) if word.startswith("--") or word == "-h" else 0

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*Command.collect_usage_pieces(self, ctx), "[SSH ARGS...]"]
