"""The script of a job: it has the tunnel client run CMD, and brings it along where the nodes have none that all share.

Slurm keeps the script for its user alone, and what is in it is on no command line. A job may be killed at any moment,
so nothing is left for its end to remove: the program has lost its name before it is unpacked, the token has none, and
the client is what Slurm itself has started and looks after.
"""

from __future__ import annotations

import base64
import gzip
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

__all__ = ["LAID", "new_token_script", "script"]

_HEAD = """\
#!/bin/sh
place="${{TMPDIR:-/tmp}}"/{folder}
"""
_BROUGHT = """\
(umask 077; set -C; : >"$place") && chmod 700 "$place" && exec 9<"$place" || exit 1
rm -f "$place"
base64 -d <<'KOHAKURIVER' | gzip -dc >/proc/self/fd/9 || exit 1
{client}
KOHAKURIVER
"""
_RUN = """\
exec {program} --log-level error --token-fd 3{run} 3<<'KOHAKURIVER'
{token}
KOHAKURIVER
"""
_NEW_TOKEN = """\
tries=0
until mkdir -m 700 "$place" 2>/dev/null; do # the token before may be there for a moment
  [ $((tries += 1)) -lt {tries} ] || exit 1
  sleep 0.1
done
trap 'rm -rf "$place"' EXIT
trap 'exit 1' HUP INT TERM
(umask 077; set -C; cat >"$place/token" <<'KOHAKURIVER'
{token}
KOHAKURIVER
) || exit 1
echo {laid}
tries=0
while [ -e "$place/token" ]; do
  [ $((tries += 1)) -lt {patience} ] || exit 1
  sleep 0.1
done
"""

LAID = "laid"
"""What a script says once a newer token is where the tunnel client looks for it."""

_TRIES = 30
_PATIENCE = 600
"""How often it is looked, ten times a second, whether there is room for a newer token, and whether that was taken."""


def script(
    folder: str, token: str, environment: Mapping[str, str], command: Sequence[str] | None, client: Path | str
) -> str:
    """What a job runs.

    `folder` is a name of its own on its node, which nobody can guess, and there only for moments. `client` is a path on
    the nodes, or that of a file here, whose content is brought along. Without a `command` (None) the tunnel client runs
    alone, beside a job.
    """
    brought = isinstance(client, Path)
    program = "/proc/self/fd/9" if isinstance(client, Path) else shlex.quote(client)
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
    run = "" if command is None else " " + shlex.join(["run", *(["--", *command] if command else [])])
    return "".join(
        [
            _HEAD.format(folder=folder),
            _BROUGHT.format(client=_packed(client)) if brought else "",
            'export KOHAKURIVER_TUNNEL_TAKE_TOKEN="$place/token"\n',
            *exports,
            _RUN.format(program=program, run=run, token=token),
        ]
    )


def new_token_script(folder: str, token: str, *, tries: int = _TRIES, patience: int = _PATIENCE) -> str:
    """Lays a newer token down for the tunnel client of a job that runs, says LAID, and ends once that has taken it.

    It fails where the folder is there, as another user's might be, or nobody takes the token.
    """
    lay = _NEW_TOKEN.format(token=token, laid=LAID, tries=tries, patience=patience)
    return _HEAD.format(folder=folder) + lay


@lru_cache(maxsize=2)
def _packed(program: Path) -> str:
    return base64.encodebytes(gzip.compress(program.read_bytes(), 6)).decode("ascii").rstrip()
