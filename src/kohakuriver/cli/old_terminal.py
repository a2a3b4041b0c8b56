"""A terminal of a host that speaks version 1 alone: JSON both ways, and a shell only (docs/protocol.md §6)."""

from __future__ import annotations

import codecs

from kohakuriver.tunnel.message_link import MessageLink
from kohakuriver.tunnel.protocol import CloseCode
from kohakuriver.tunnel.terminal import control, exited, read_control, resize

__all__ = ["OldTerminal"]

END_OF_INPUT = "\x04"


class OldTerminal:
    """What `link` carries in version 1's messages, in and out as those of version 2.

    Whoever sends gets what a MessageLink raises; `receive` raises UsageError for a message that makes no sense.
    """

    def __init__(self, link: MessageLink) -> None:
        self._link = link
        self._typed = codecs.getincrementaldecoder("utf-8")("replace")
        self._exited = False

    async def send(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            await self._type(self._typed.decode(message))
            return
        said = read_control(message)
        if said["type"] == "eof":
            await self._type(END_OF_INPUT)
        elif "rows" in said:  # the size, which version 2 also has in its first message
            await self._link.send(resize(said["rows"], said["cols"]))

    async def _type(self, text: str) -> None:
        if text:  # else the rest of a character is still to come
            await self._link.send(control("input", data=text))

    async def receive(self) -> str | bytes | None:
        """The next message, None at the end. A shell that ended is an exit code of 0 where the host tells none."""
        while (message := await self._link.receive()) is not None:
            if isinstance(message, bytes):
                return message
            said = read_control(message)
            if said["type"] != "output":
                self._exited = self._exited or said["type"] == "exit"
                return message
            if data := str(said.get("data") or ""):
                return data.encode("utf-8", "replace")
        if self._link.close_code == CloseCode.NORMAL and not self._exited:
            self._exited = True
            return exited(0)
        return None

    @property
    def close_code(self) -> int:
        return self._link.close_code

    @property
    def close_reason(self) -> str:
        return self._link.close_reason

    def begin_close(self) -> None:
        self._link.begin_close()

    async def wait_closed(self) -> None:
        await self._link.wait_closed()
