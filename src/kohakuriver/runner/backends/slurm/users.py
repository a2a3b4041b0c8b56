"""Who a user of ours is on the cluster, as its administrator says in a file, and how a program is run as them."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kohakuriver.errors import UnavailableError, UsageError

__all__ = ["ClusterUser", "ClusterUsers"]

_EVERYBODY = "*"
_FIRST_PERSON = 1000
"""Users with lower numbers are the system's own (login.defs(5)): `* *` names none of them."""
_NOBODY = 65534
"""Nor this one, as whom systems have run what is to have no rights, and whose are the files of a foreign root."""


@dataclass(frozen=True)
class ClusterUser:
    """A user of the cluster, and so of this machine."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` as this user; a runner that is not root needs sudo(8) for others."""
        if self.uid == os.geteuid():
            return list(words)
        if os.geteuid() == 0:
            return ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups", "--", *words]
        return ["sudo", "-n", "-u", self.name, "--", *words]

    @property
    def is_ours_to_end(self) -> bool:
        """Whether the runner may kill what this user runs: sudo(8) it may not."""
        return os.geteuid() in (0, self.uid)

    @property
    def environment(self) -> dict[str, str]:
        """Who it is, for its programs."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "SHELL": self.shell}


class ClusterUsers:
    """The file `path`: lines `USER NAME`, a user of ours and one of the cluster; `* *` is everybody under the own name.

    What stands behind # is for people. The file is read again when it has changed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._names: dict[str, str] = {}
        try:
            self._look()
        except ValueError as error:
            raise UsageError(f"--slurm-users: {error}.") from None

    def of(self, user: str) -> ClusterUser:
        """Who `user` is on the cluster.

        Raises UnavailableError "no_slurm_user" for whom nobody is named, and where the file can't be used.
        """
        try:
            self._look()
        except ValueError as error:
            raise UnavailableError(f"The node can't say who is who in Slurm: {error}.", code="no_slurm_user") from None
        name = self._names.get(user)
        if name is None and self._names.get(_EVERYBODY) == _EVERYBODY:
            return self._person(user)
        if name is None:
            raise _nobody(user, "has no user of the Slurm cluster")
        return self._found(user, name, least=1)

    @classmethod
    def named(cls, user: str, name: str) -> ClusterUser:
        """Whom `user` was when a job was started, which is to end whatever the file says now. Raises as `of` does."""
        return cls._found(user, name, least=1)

    @classmethod
    def _person(cls, name: str) -> ClusterUser:
        found = cls._found(name, name, least=_FIRST_PERSON)
        if found.uid == _NOBODY:
            raise _nobody(name, f"would be the system's own user {name} in Slurm")
        if found.uid == os.geteuid():
            raise _nobody(name, "would be the runner's own user in Slurm, whom only a line of the own names")
        return found

    @staticmethod
    def _found(user: str, name: str, *, least: int) -> ClusterUser:
        import pwd  # not there on every system

        try:
            known = pwd.getpwnam(name)
        except KeyError:
            raise _nobody(user, f"would be {name} in Slurm, whom this node does not know") from None
        if known.pw_uid < least:
            raise _nobody(user, f"would be the system's own user {name} in Slurm")
        return ClusterUser(name, known.pw_uid, known.pw_gid, known.pw_dir or "/", known.pw_shell or "/bin/sh")

    def _look(self) -> None:
        """Read the file if it is another than it was. Raises ValueError with what is wrong, a clause."""
        try:
            about = self._path.stat()
            if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ValueError(f"others may write {self._path}; chmod 644")
            if (about.st_mtime_ns, about.st_ino) != self._read_at:
                self._names = _parsed(self._path.read_text("utf-8"), self._path)
                self._read_at = (about.st_mtime_ns, about.st_ino)
        except OSError as error:
            raise ValueError(f"{self._path} can't be read: {error.strerror}") from None


def _parsed(text: str, path: Path) -> dict[str, str]:
    names = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or (_EVERYBODY in words and words != [_EVERYBODY, _EVERYBODY]):
            raise ValueError(f"line {number} of {path} is no `USER NAME`, nor `* *`")
        names[words[0]] = words[1]
    return names


def _nobody(user: str, what: str) -> UnavailableError:
    return UnavailableError(
        f"{user} {what}; the cluster's administrator names one in the runner's --slurm-users file.",
        code="no_slurm_user",
    )
