"""Logging a command line in by a browser, somebody's here or elsewhere: no token is typed or shown."""

from __future__ import annotations

import asyncio
import getpass
import re
import socket
import threading
import time
from typing import TYPE_CHECKING

from kohakuriver.cli import output
from kohakuriver.cli.web_browser import open_window
from kohakuriver.config import browser_url
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, UnauthenticatedError

if TYPE_CHECKING:
    from kohakuriver.client.host import DeviceAsked, HostClient, Token

__all__ = ["machine_name", "token_by_browser"]

PAUSE = 1.0
"""Seconds between two questions where the host did not hold the first one."""

LONGEST_NAME = 63


def machine_name() -> str:
    """What this command line calls itself, as a token can be called: ann@laptop."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = ""
    name = f"{user}@{socket.gethostname()}" if user else socket.gethostname()
    return re.sub(r"[^A-Za-z0-9 ._@-]+", "-", name).lstrip(" ._@-")[:LONGEST_NAME].strip() or "command line"


async def token_by_browser(client: HostClient) -> Token:
    """A token that somebody has confirmed in a browser, with its secret; one is opened where this user has a screen.

    Raises UnauthenticatedError where nobody did in time, NotAllowedError where it was refused.
    """
    asked = await client.ask_for_login(machine_name())
    if browser_url(asked.url, "") != asked.url:
        output.note("In the browser that `kohakuriver open` has logged in to this host, go to its page /device.")
    else:
        output.note(f"In a browser, go to: {asked.url}")
        # On a thread of its own: some return only when they are closed. Without one, nothing happens.
        threading.Thread(target=open_window, args=(asked.url,), name="browser", daemon=True).start()
    output.note(f"Type this code there, within {asked.expires_in / 60:.0f} minutes: {asked.user_code}")
    with output.working("Waiting for the browser"):
        return await _confirmed(client, asked)


async def _confirmed(client: HostClient, asked: DeviceAsked) -> Token:
    deadline = time.monotonic() + asked.expires_in
    while time.monotonic() < deadline:
        began = time.monotonic()
        try:
            return await client.take_login(asked)
        except HostUnreachableError:  # it may come back, and knows of this still
            await asyncio.sleep(PAUSE)
        except KohakuRiverError as error:
            if error.code not in ("authorization_pending", "slow_down"):
                raise
            if error.code == "slow_down" or time.monotonic() - began < PAUSE:
                await asyncio.sleep(PAUSE)
    raise UnauthenticatedError("Nobody has confirmed this login in time; run the command again.", code="expired_token")
