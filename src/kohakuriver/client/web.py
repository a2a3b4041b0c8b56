"""A forward that gives HTTP ports of its task addresses of their own, `http://lab-8888.localhost:PORT/`, on
this machine.

Each address is an origin of its own to a browser, with nothing set up: browsers take *.localhost for loopback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kohakuriver.client.events import Served
from kohakuriver.client.forward import STOPPED, Event, Forwarder, PathChoice
from kohakuriver.client.host import HostClient
from kohakuriver.client.local_side import LocalSide
from kohakuriver.client.ports import LOOPBACK, PortForward
from kohakuriver.config import Settings
from kohakuriver.errors import UsageError
from kohakuriver.gateway.gate import Door, Gate
from kohakuriver.gateway.gateway import Gateway
from kohakuriver.gateway.names import Place, is_label

__all__ = ["WebForwarder", "label_of"]


async def label_of(task: str, settings: Settings) -> str:
    """What stands for the task in addresses: what it was called, where that can be, else its id.

    Raises KohakuRiverError where the host must be asked, and has no such task or does not answer.
    """
    if is_label(task):
        return task
    async with HostClient(settings) as client:
        return str((await client.task(task)).task_id)


class WebForwarder(Forwarder):
    """A forward with an address for each of its TCP ports.

    Args:
        label: what stands for the task in addresses. Default: what it is called, or its id (`label_of`).
        plain: it forwards its ports, too, as without addresses.
        web_port: the local port of all addresses; 0 is any free one.
        preserve_host: services are told the address, in the place of localhost and their port.

    The rest are a Forwarder's. Raises UsageError where no port is TCP's.
    """

    def __init__(
        self,
        task: str,
        ports: Sequence[PortForward],
        *,
        label: str | None = None,
        settings: Settings,
        plain: bool = True,
        web_port: int = 0,
        preserve_host: bool = False,
        local_host: str = LOOPBACK,
        patience: float | None = None,
        resume: bool = True,
        fallback: bool = False,
        path: PathChoice | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        super().__init__(
            task,
            ports,
            settings=settings,
            local_host=local_host,
            patience=patience,
            resume=resume,
            fallback=fallback,
            path=path,
            on_event=on_event,
        )
        self._label = label
        self._plain = plain
        self._web_port = web_port
        self._preserve_host = preserve_host
        self._tell = on_event
        self._gateway: Gateway | None = None
        self.doors: list[Door] = []
        if not self._served():
            raise UsageError("An address of its own is for HTTP, so give a TCP port.")

    def _served(self) -> list[int]:
        return list(dict.fromkeys(port.remote for port in self.ports if port.proto == "tcp"))

    async def start(self) -> None:
        if self._label is None:
            self._label = await label_of(self.task, self._settings)
        try:
            await super().start()
        except BaseException:
            self._close_gateway()
            raise
        for door in self.doors:
            self._tell(Served(door.place.url, door.link(), door.place.port))

    async def close(self, reason: str = STOPPED, *, deliver: bool = False) -> None:
        self._close_gateway()
        await super().close(reason, deliver=deliver)

    def _close_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.close()

    async def _listen_everywhere(self) -> None:
        if self._plain:
            await super()._listen_everywhere()
        gate = Gate(self._another)
        gateway = self._gateway = Gateway(self._endpoint, gate, lambda: self._not_running)
        # Whoever had the other loopback address would be sent the browser's link, and its cookie.
        local = LocalSide(self._endpoint, LOOPBACK, self._half_listening, made=gateway.visit, both=True)
        self._beside = await local.listen([PortForward(self._web_port, 0)])
        served_on = self._beside[0].port
        label = self._label or self.task
        self.doors = gate.add([Place(label, port, served_on, self._preserve_host) for port in self._served()])

    def _another(self, place: Place) -> str:
        return f"On the machine that you sit at, `kohakuriver open {self.task} {place.port}` opens a new link."
