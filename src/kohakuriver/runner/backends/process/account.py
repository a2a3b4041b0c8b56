"""As whom process tasks run: as the runner's own user, or as another one, which takes a runner that is root."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kohakuriver.errors import UsageError

__all__ = ["Account", "OtherAccount", "account_named"]

_FOR_ALL = ("PATH", "LANG", "LANGUAGE", "TZ")
"""Variables of the runner that say nothing of who it is, besides LC_*."""

_THROUGH, _OWN = 0o710, 0o700


class Account:
    """The runner's own user, who has and may what the runner has and may."""

    @property
    def whose(self) -> str:
        """Who a task is, for people."""
        return "root" if os.geteuid() == 0 else "the runner's own user"

    @property
    def ids(self) -> str:
        """What terminal_child.py is told of it; empty where nothing has to be changed."""
        return ""

    def environment(self) -> dict[str, str]:
        """What every process of a task sees; the runner's settings (its node token, …) are none of their business."""
        return {name: value for name, value in os.environ.items() if not name.startswith("KOHAKURIVER_")}

    def reaches(self, directory: Path) -> bool:
        """Whether it may enter a directory that there is."""
        return True

    def lets_through(self, *directories: Path) -> None:
        """Let it pass directories of ours on its way to what it may use; it sees and changes nothing there."""

    def gets(self, *files: int | Path) -> None:
        """Files, or descriptors, of ours are its own from now on; directories with all that is in them."""

    def gets_to_take(self, file: Path) -> Path:
        """A file of ours is its own, in a directory that is its own too; where that is."""
        return file


class OtherAccount(Account):
    """Another user of this machine."""

    def __init__(self, name: str, uid: int, gid: int, groups: list[int], home: str, shell: str) -> None:
        self.name = name
        self.uid = uid
        self._gid = gid
        self._groups = groups
        self._own = {"HOME": home, "USER": name, "LOGNAME": name, "SHELL": shell}

    @property
    def whose(self) -> str:
        return f"the user {self.name}"

    @property
    def ids(self) -> str:
        return ":".join(map(str, (self.uid, self._gid, *self._groups)))

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in _FOR_ALL or name.startswith("LC_")}
        return {**kept, **self._own}

    def reaches(self, directory: Path) -> bool:
        directory = directory.resolve()
        return all(self._enters(each.stat()) for each in (directory, *directory.parents))

    def _enters(self, found: os.stat_result) -> bool:
        if found.st_uid == self.uid:
            return bool(found.st_mode & stat.S_IXUSR)
        if found.st_gid in (self._gid, *self._groups):
            return bool(found.st_mode & stat.S_IXGRP)
        return bool(found.st_mode & stat.S_IXOTH)

    def lets_through(self, *directories: Path) -> None:
        for directory in directories:
            os.chown(directory, -1, self._gid)
            directory.chmod(_THROUGH)

    def gets(self, *files: int | Path) -> None:
        for file in files:
            if isinstance(file, Path) and file.is_dir() and file.stat().st_uid != self.uid:
                self._gets_all(file)
            os.chown(file, self.uid, self._gid)

    def _gets_all(self, directory: Path) -> None:
        """What tasks of another user have left in it. No link leads elsewhere, and none of several names is given."""
        directory.chmod(_OWN)
        for _, folders, files, here in os.fwalk(directory):
            for name in (*folders, *files):
                found = os.stat(name, dir_fd=here, follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode) or found.st_nlink == 1:
                    os.chown(name, self.uid, self._gid, dir_fd=here, follow_symlinks=False)

    def gets_to_take(self, file: Path) -> Path:
        folder = file.parent / "own"
        folder.mkdir(exist_ok=True, mode=_OWN)
        self.gets(folder, file)
        return file.replace(folder / file.name)  # never written there by us: in its directory it could be a link


def account_named(name: str | None, state_dir: Path) -> Account:
    """As whom the tasks of a runner run; None for its own user.

    Raises UsageError where that can't be: no such user, a runner that is not root, a state directory out of reach.
    """
    if name is None:
        return Account()
    import pwd  # not there on every system

    try:
        known = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"--process-user: this machine has no user {name!r}; make it first.") from None
    if known.pw_uid == os.geteuid():
        return Account()
    if os.geteuid() != 0:
        raise UsageError("--process-user takes a runner that is root; start it as root, or leave the option out.")
    groups = os.getgrouplist(name, known.pw_gid)
    account = OtherAccount(name, known.pw_uid, known.pw_gid, groups, known.pw_dir, known.pw_shell)
    if not account.reaches(state_dir.resolve().parent):
        raise UsageError(
            f"--process-user: {name} may not enter {state_dir.resolve().parent}, and its tasks work below; give the "
            "runner a --state-dir elsewhere."
        )
    return account
