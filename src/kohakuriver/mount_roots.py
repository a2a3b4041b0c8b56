"""What users who are no admins may mount of a node: directories that its administrator names (`runner --mount-root`).

The host goes by the names, to choose a node and to say what is allowed. The node, which alone sees the files, checks
again where a name leads to, and mounts that place: no symlink leads out of a root.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kohakuriver.errors import NotAllowedError, UsageError

__all__ = ["MOUNT_NOT_ALLOWED", "MountRoot", "MountRoots", "refused"]

MOUNT_NOT_ALLOWED = "mount_not_allowed"
"""The error for a mount that is not for its user."""

_USER = "{user}"


@dataclass(frozen=True)
class MountRoot:
    """A directory. One that is `read_only` may be mounted for reading, and so may every directory below it.

    One that can be written is mounted as a whole or not at all: whoever may write in it could put a symlink in the
    place of a directory between the check and the mount.
    """

    path: str
    read_only: bool

    @classmethod
    def parse(cls, text: str) -> MountRoot:
        """`/data:ro`, or `/home/{user}`. Raises ValueError, with what is wanted, for anything else."""
        path, _, mode = text.partition(":")
        parts = path.split("/")[1:]
        fits = path.startswith("/") and posixpath.normpath(path) == path and path not in ("/", "//")
        fits = fits and mode in (("ro", "rw") if ":" in text else ("",)) and path.isprintable()
        if not fits or any("{" in part or "}" in part for part in parts if part != _USER):
            raise ValueError(
                f"{text!r} is no directory that users could mount; write a whole path, as /data:ro or /home/{_USER}"
            )
        return cls(path, mode == "ro")

    def of(self, user: str) -> MountRoot:
        """The root as it is for one user."""
        return MountRoot(self.path.replace(_USER, user), self.read_only)

    def allows(self, source: str, read_only: bool) -> bool:
        """Whether the directory of this name may be mounted, going by the name alone."""
        source = source.rstrip("/")
        if source == self.path:
            return read_only or not self.read_only
        inside = source.startswith(f"{self.path}/") and posixpath.normpath(source) == source
        return inside and read_only and self.read_only

    def __str__(self) -> str:
        return f"{self.path}:ro" if self.read_only else self.path


class MountRoots:
    """All roots of a node."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Raises ValueError for a text that is no root."""
        self._roots = [MountRoot.parse(text) for text in texts]

    def __str__(self) -> str:
        return ", ".join(map(str, self._roots))

    def of(self, user: str) -> list[MountRoot]:
        """Those of one user."""
        return [root.of(user) for root in self._roots]

    def allow(self, mounts: Iterable[str], user: str) -> bool:
        """Whether the user may have all of these mounts, `SRC:DST` or `SRC:DST:ro`, going by their names alone."""
        return all(self._root_for(mount, self.of(user)) is not None for mount in mounts)

    def resolved(self, mounts: Sequence[str], user: str | None) -> list[str]:
        """These mounts with the places that their sources lead to; as they are where nothing binds `user`, who is None.

        Looks at the disk. Raises NotAllowedError, or UsageError for a directory that is not there.
        """
        return list(mounts) if user is None else [self._resolved(mount, user) for mount in mounts]

    def _resolved(self, mount: str, user: str) -> str:
        roots = self.of(user)
        root = self._root_for(mount, roots)
        if root is None:
            raise refused([mount], roots)
        source, rest = mount.split(":", 1)
        try:
            place, top = os.path.realpath(source, strict=True), os.path.realpath(root.path, strict=True)
        except OSError as error:
            reason = "it is not there" if isinstance(error, FileNotFoundError) else error.strerror or "it can't be read"
            raise UsageError(f"{source} can't be mounted: {reason}; ask whoever runs this node.") from None
        if place != top and os.path.commonpath([place, top]) != top:
            raise refused([mount], roots, f"{source} leads out of {root.path}")
        if ":" in place:
            raise UsageError(f"{source} can't be mounted: there is a colon in the name of the place that it leads to.")
        return f"{place}:{rest}"

    def _root_for(self, mount: str, roots: Iterable[MountRoot]) -> MountRoot | None:
        source, _, rest = mount.partition(":")
        read_only = rest.endswith(":ro")
        return next((root for root in roots if root.allows(source, read_only)), None)


def refused(mounts: Iterable[str], roots: Iterable[MountRoot], why: str = "") -> NotAllowedError:
    """The error for somebody who may mount `roots` and asks for `mounts`."""
    allowed = ", ".join(
        f"{root} and what is below it" if root.read_only else f"{root} as a whole" for root in dict.fromkeys(roots)
    )
    wanted = ", ".join(mount[:200] for mount in mounts)
    reason = f" ({why})" if why else ""
    return NotAllowedError(
        f"You may not mount {wanted}{reason}; what you may mount is {allowed or 'nothing'}, and whoever runs this host "
        "can allow more.",
        code=MOUNT_NOT_ALLOWED,
    )
