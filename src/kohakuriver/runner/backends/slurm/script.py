"""The script of a job: it lays the tunnel client and its token down where the job runs, and has the client run CMD.

Slurm keeps it for its user alone, and what is in it is on no command line. Nothing has to be installed on the nodes:
where they have no tunnel client in a directory that all share, the script brings it along.
"""

from __future__ import annotations

import base64
import gzip
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

__all__ = ["new_token_script", "script"]

_HEAD = """\
#!/bin/sh
place="${{TMPDIR:-/tmp}}"/{folder}
"""
_BEGIN = """\
mkdir -m 700 "$place" || exit 1
trap 'rm -rf "$place"' EXIT
trap : HUP INT TERM # the tunnel client gets them too, and ends first
"""
_THERE = """\
# It may have gone with the job's client, and be another user's by now, or a link.
cd "${{TMPDIR:-/tmp}}" && above=$(pwd -P) && cd ./{folder} || exit 1
[ "$(pwd -P)" = "${{above%/}}/{folder}" ] && [ -O . ] || exit 1
rm -f token
"""
_NEW_TOKEN = """\
(umask 077; set -C; cat >token <<'KOHAKURIVER'
{token}
KOHAKURIVER
) || exit 1
"""
_TOKEN = """\
(umask 077; cat >"$place/token" <<'KOHAKURIVER'
{token}
KOHAKURIVER
) || exit 1
"""
_BROUGHT = """\
(umask 077; base64 -d <<'KOHAKURIVER' | gzip -dc >"$place/tunnel-client" && chmod 700 "$place/tunnel-client"
{client}
KOHAKURIVER
) || exit 1
"""


def script(
    folder: str, token: str, environment: Mapping[str, str], command: Sequence[str] | None, client: Path | str
) -> str:
    """What a job runs.

    `folder` is its own on its node, with a name that nobody can guess. `client` is a path on the nodes, or that of a
    file here, whose content is brought along. Without a `command` (None) the tunnel client runs alone, beside a job.
    """
    brought = isinstance(client, Path)
    program = '"$place/tunnel-client"' if isinstance(client, Path) else shlex.quote(client)
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
    run = "" if command is None else " " + shlex.join(["run", *(["--", *command] if command else [])])
    return "".join(
        [
            _HEAD.format(folder=folder),
            _BEGIN,
            _TOKEN.format(token=token),
            _BROUGHT.format(client=_packed(client)) if brought else "",
            'export KOHAKURIVER_TUNNEL_TAKE_TOKEN="$place/token"\n',
            *exports,
            f"{program} --log-level error{run}\n",
            "exit $?\n",
        ]
    )


def new_token_script(folder: str, token: str) -> str:
    """Lays a newer token down for the tunnel client of a job that runs; fails where its folder is gone."""
    return "#!/bin/sh\n" + _THERE.format(folder=folder) + _NEW_TOKEN.format(token=token)


@lru_cache(maxsize=2)
def _packed(program: Path) -> str:
    return base64.encodebytes(gzip.compress(program.read_bytes(), 6)).decode("ascii").rstrip()
