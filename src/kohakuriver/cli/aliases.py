"""Other programs' words for our commands: whoever types them gets what they mean."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from typer.core import TyperGroup

from kohakuriver.cli import output
from kohakuriver.errors import UsageError

__all__ = ["WithAliases"]

_MEANT = 0.7  # `create` is as near to `rename` as 0.67
_EVERYWHERE = {"ls": "list", "delete": "remove"}
_IN = {
    "kohakuriver": {
        "ls": "vps list", "ps": "vps list", "list": "vps list", "start": "vps restart", "stop": "vps stop",
        "exec": "connect", "ssh": "vps connect", "login": "auth login", "logout": "auth logout",
        "whoami": "auth status", "status": "vps status", "create": "vps create", "run": "vps create",
        "logs": "vps logs", "rm": "vps rm", "restart": "vps restart", "adopt": "vps adopt", "nodes": "node list",
        "ports": "vps ports", "port": "vps ports",
    },
    "vps": {
        "ls": "list", "ps": "list", "start": "restart", "remove": "rm", "delete": "rm", "ssh": "connect",
        "run": "create", "port": "ports",
    },
    "node": {"ls": "list"},
}  # fmt: skip


def _asked_otherwise(args: list[str]) -> list[str]:
    """`help vps list` and `version` as the options that they stand for."""
    if args[:1] == ["help"]:
        return [*args[1:], "--help"]
    return ["--version"] if args == ["version"] else args


class WithAliases(TyperGroup):
    """A group that knows its commands by those words too; its help shows its own words alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = _asked_otherwise(args)
        option = args[0].partition("=")[0] if args else ""
        known = {name for each in self.get_params(ctx) for name in each.opts}
        found = any(self.get_command(ctx, each) for each in args)
        misplaced = found and option.startswith("-") and option not in known
        output.errors_as_json("--json" in args and (misplaced or not found))
        if misplaced and not ctx.resilient_parsing:
            raise UsageError(
                f"An option stands behind the command that it is for: {ctx.command_path} COMMAND … {option}"
            )
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            return found
        words = _IN.get(self.name or "", _EVERYWHERE).get(cmd_name)
        command: Any = self if words else None
        for word in (words or "").split():
            command = command and command.commands.get(word)
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0] if args else ""
        if not word or word.startswith("-") or ctx.resilient_parsing or self.get_command(ctx, word) is not None:
            return super().resolve_command(ctx, args)
        near = ", ".join(repr(name) for name in get_close_matches(word, self.commands, cutoff=_MEANT))
        return ctx.fail(f"No such command {word!r}." + (f" Did you mean {near}?" if near else ""))
