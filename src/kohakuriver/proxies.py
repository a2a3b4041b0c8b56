"""Proxies before this program whose word counts: for whom they ask, and whether that one came over TLS. No I/O.

What a request says of itself (`X-Forwarded-For`, `-Proto`) anybody can write. It is believed from the addresses alone
that an administrator has named, and only as far as these have written it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from kohakuriver.errors import UsageError

__all__ = ["Proxies"]

_MOST = 32
"""Words of a list that are looked at: nobody has so many proxies one after the other."""


class Proxies:
    """`networks` are those of the proxies, as "10.0.0.0/8" or one address. Raises UsageError."""

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = [_network(text) for text in networks]

    def __bool__(self) -> bool:
        return bool(self._networks)

    def trusts(self, address: str) -> bool:
        """Whether what comes from this address is a proxy's word."""
        parsed = _address(address)
        return parsed is not None and self._has(parsed)

    def client(self, peer: tuple[str, int], forwarded_for: Sequence[str]) -> tuple[str, int]:
        """Who asks, by the address and port of the peer and all its X-Forwarded-For fields.

        Each proxy adds the address that it saw at the end of the list. So it is read from there, as long as who wrote
        the next word is a proxy of ours. A port that nobody tells is 0.
        """
        if not self._networks or not self.trusts(peer[0]):
            return peer
        client = peer
        for word in reversed(",".join(forwarded_for).split(",")[-_MOST:]):
            told = _told(word.strip())
            if told is None:
                break
            client = told
            if not self.trusts(told[0]):
                break
        return client

    def tls(self, peer: str, forwarded_proto: Sequence[str]) -> bool | None:
        """Whether a browser came over TLS, as a proxy at the address `peer` says; None where none says it.

        Of several words the last one counts: it is that of the proxy next to us.
        """
        if not self._networks or not forwarded_proto or not self.trusts(peer):
            return None
        said = forwarded_proto[-1].rpartition(",")[2].strip().lower()
        return {"https": True, "wss": True, "http": False, "ws": False}.get(said)

    def _has(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(text.strip())
        if isinstance(network, IPv4Network) or network.network_address.ipv4_mapped is None:
            return network
        # Peers are known by the address behind ::ffff:.
        return ip_network((network.network_address.ipv4_mapped, max(0, network.prefixlen - 96)), strict=False)
    except ValueError:
        raise UsageError(
            f"{text[:100]!r} is no network of proxies: give an address or a network, as in "
            "`--trusted-proxy 10.0.3.0/24`; behind the length all bits are 0."
        ) from None


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        parsed = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # What listens on :: sees 127.0.0.1 as ::ffff:127.0.0.1.
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _told(word: str) -> tuple[str, int] | None:
    """An address of the list, with its port where it has one: as `a.b.c.d`, `a.b.c.d:port`, `v6`, `[v6]:port`."""
    name, port = word, ""
    if word.startswith("["):
        name, _, port = word[1:].partition("]")
        port = port.removeprefix(":")
    elif word.count(":") == 1:
        name, _, port = word.partition(":")
    parsed = _address(name)
    if parsed is None or (port and not (port.isascii() and port.isdigit() and len(port) <= 5)):
        return None
    return str(parsed), int(port or 0)
