"""As which user, by its number, the processes of a container run."""

from __future__ import annotations

import io
import posixpath
import tarfile

import aiodocker

from kohakuriver.errors import UnavailableError

__all__ = ["user_number"]

_PASSWD = "/etc/passwd"
_MOST_BYTES = 1 << 20
_MOST_LINKS = 4


async def user_number(docker: aiodocker.Docker, container: str, user: str) -> int:
    """The number of a container's `user`, as its configuration has it: `NAME`, `NUMBER`, either with `:GROUP`, or "".

    Raises UnavailableError where only the container knows. May raise DockerError.
    """
    name = user.partition(":")[0]
    if not name or name.isdecimal():
        return int(name or 0)
    for line in (await _passwd(docker, container)).decode("utf-8", "replace").splitlines():
        fields = line.split(":")
        if fields[0] == name and len(fields) > 2 and fields[2].isdecimal():
            return int(fields[2])
    raise UnavailableError(f"The container's /etc/passwd does not say which number its user {name!r} has.")


async def _passwd(docker: aiodocker.Docker, container: str) -> bytes:
    path = _PASSWD
    for _ in range(_MOST_LINKS):
        with tarfile.open(fileobj=io.BytesIO(await _archive(docker, container, path))) as archive:
            entry = archive.next()
            file = archive.extractfile(entry) if entry is not None and entry.isreg() else None
            if file is not None:
                return file.read()
            if entry is None or not entry.issym():
                break
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), entry.linkname))
    raise UnavailableError("The container's /etc/passwd is no file.")


async def _archive(docker: aiodocker.Docker, container: str, path: str) -> bytes:
    content = b""
    async with docker._query(f"containers/{container}/archive", params={"path": path}) as response:
        async for piece in response.content.iter_chunked(1 << 16):
            content += piece
            if len(content) > _MOST_BYTES:
                raise UnavailableError("The container's /etc/passwd is too large to be read.")
    return content
