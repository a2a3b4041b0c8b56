"""What the service sees of a request, and the browser of a response: heads alone, bodies are never touched. No I/O."""

from __future__ import annotations

import re
from functools import lru_cache

from kohakuriver.gateway.entrance import is_ours, without_ours
from kohakuriver.gateway.heads import CHUNKED, RequestHead, ResponseHead, words
from kohakuriver.gateway.names import Place

__all__ = ["request", "response"]

# What is between two neighbours and not between the ends (RFC 9110 section 7.6.1). Framing is written anew.
_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_TOLD_BY_US = frozenset(
    {
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-forwarded-server",
        b"x-real-ip",
    }
)
_NEVER_NAMED = frozenset({b"host", b"cookie", b"authorization", b"content-length", b"origin"})
_NEVER_NAMED_BACK = frozenset({b"set-cookie", b"content-length", b"location"})
# What proxies before us take for orders of ours: to answer with a file or an address of theirs, and what to keep. Of
# some makers all that begins so, since new ones come.
_ORDERS = frozenset({b"x-accel-expires", b"x-accel-redirect"})
_ORDERS_BEGIN = (b"x-sendfile", b"x-litespeed-", b"x-lighttpd-", b"x-reproxy-")
_ANSWER_DROPPED = _HOP | _ORDERS
# Those with addresses; a browser goes where Location and Refresh lead, and loads ahead what Link names.
_ADDRESSES = frozenset({b"location", b"content-location", b"refresh", b"link"})
_ANSWER_CHANGED = _ADDRESSES | {b"set-cookie", b"clear-site-data"}
# What browsers take for all of an origin: from one of several apps there it would go for the others, and outlive it.
_OF_ORIGIN = frozenset(
    {
        b"alt-svc",
        b"clear-site-data",
        b"nel",
        b"report-to",
        b"sec-session-registration",
        b"secure-session-registration",
        b"strict-transport-security",
        b"use-as-dictionary",
    }
)
_ALONE = (_ANSWER_DROPPED, _ANSWER_CHANGED)
_UNDER_PREFIX = (_ANSWER_DROPPED | _OF_ORIGIN, _ANSWER_CHANGED | {b"service-worker-allowed", b"www-authenticate"})
_BASIC = re.compile(rb"(?i)(?:^|,)[ \t]*basic(?![^ \t,])")
_REALM = re.compile(rb'(?i)realm[ \t]*=[ \t]*"?([^"\\,]*)')
_HOST_NAME, _SECURE_NAME = b"__host-", b"__Secure-Host-"
# What says that an answer may be kept, beside Cache-Control and those that end so, as Cloudflare-CDN-Cache-Control.
_KEEPING = frozenset({b"expires", b"pragma", b"surrogate-control"})
_KEEPING_ENDS = b"cache-control"
# What a service may have a browser clear. Browsers read words with blanks and stars in ways of their own.
_CLEARED = frozenset({b'"cache"', b'"storage"', b'"executionContexts"', b'"clientHints"'})
_NONE: frozenset[bytes] = frozenset()
# What programs of the service's side take for the same field: to WSGI and CGI dash and underscore are one.
_REQUEST_DROPPED = _HOP | _TOLD_BY_US | {b"host"}
# The last two are WebDAV's (RFC 4918 section 10): where to copy or move to, and what has to be so at which addresses.
_REQUEST_CHANGED = frozenset({b"cookie", b"origin", b"referer", b"destination", b"if"})
_TAGGED = re.compile(rb"(?<=<)[^<>]*(?=>)")
_LINKED = re.compile(rb"((?:^|,)[ \t]*<)([^<>]*)(?=>)")
# HTML's "shared declarative refresh steps": seconds, and what may be in front of the address and its quotation mark.
_REFRESH = re.compile(rb"(?i)[ \t]*[0-9.]*[ \t]*[;,]?[ \t]*(?:url[ \t]*=[ \t]*)?")


def request(head: RequestHead, place: Place, peer: str, *, body: int, upgrade: bool) -> bytes:
    """The head that the service gets, from a browser at the address `peer`. `body`: its length, or CHUNKED."""
    named = _named(head, _NEVER_NAMED)
    inner = place.inner_host.encode()
    target = head.target if place.keep_prefix else place.path(head.target)
    lines = [b"%s %s HTTP/1.%d" % (head.method, target, head.minor), b"Host: " + inner]
    for lower, name, value in head.fields.listed:
        if lower.replace(b"_", b"-") in _REQUEST_DROPPED or lower in named:
            continue
        if lower in _REQUEST_CHANGED:
            value = _told(lower, value, place, inner)
            if not value:
                continue
        lines.append(name + b": " + value)
    if upgrade:
        lines += [b"Connection: Upgrade", b"Upgrade: websocket"]
    elif head.minor == 0:
        lines.append(b"Connection: close")
    if body == CHUNKED:
        lines.append(b"Transfer-Encoding: chunked")
    lines += [
        b"X-Forwarded-For: " + peer.encode(),
        b"X-Forwarded-Host: " + place.host.encode(),
        b"X-Forwarded-Proto: " + place.scheme.encode(),
        *([b"X-Forwarded-Prefix: " + place.stripped] if place.stripped else []),
        b"\r\n",
    ]
    return b"\r\n".join(lines)


def _told(name: bytes, value: bytes, place: Place, inner: bytes) -> bytes:
    """A field of a request that names an address, or a Cookie, as the service is told it; nothing where it is not."""
    if name == b"cookie":
        return without_ours(_host_names_back(value) if place.prefix else value)
    if name == b"destination":
        return _target(value, place, inner)
    if name == b"if":
        return _TAGGED.sub(lambda match: _target(match[0], place, inner), value)
    origin = place.origin.encode()
    if name == b"referer" and place.prefix:
        path = value[len(origin) :] if value.startswith(origin + b"/") else b""
        if path not in (b"", b"/") and not place.has(path):
            return b""  # the address of another app is none of its business
        if path != b"/":
            origin += place.stripped
    return value if place.preserve_host else _inside(value, origin, inner)


def _target(url: bytes, place: Place, inner: bytes) -> bytes:
    """An address that a page wants the service to do something at. It may lack the prefix: the service has told it."""
    origin = place.origin.encode()
    there = origin if url == origin or url.startswith(origin + b"/") else b""
    path = url[len(there) :]
    if not there and (not path.startswith(b"/") or path.startswith(b"//")):
        return url
    if place.has(path):
        path = path[len(place.stripped) :] or b"/"
    return (there if place.preserve_host or not there else b"http://" + inner) + path


def _named(head: RequestHead | ResponseHead, never: frozenset[bytes]) -> frozenset[bytes]:
    """The fields that are between two neighbours because Connection names them; `never` are those that can't be."""
    values = head.fields.named.get(b"connection")
    return frozenset(words(values)) - never if values else _NONE


def _inside(url: bytes, origin: bytes, inner: bytes) -> bytes:
    """An Origin, or a Referer, as it is inside."""
    if url == origin or url.startswith(origin + b"/"):
        return b"http://" + inner + url[len(origin) :]
    return url


def response(
    head: ResponseHead, place: Place, *, body: int, close: bool, upgrade: bool = False, more: bytes = b""
) -> bytes:
    """The head that the browser gets. `close`: the connection ends with this response; `more`: fields of our own.

    With such fields, a cookie that lets in, nobody is to keep it: a cache before us would give them to others.
    """
    named = _named(head, _NEVER_NAMED_BACK) | (_KEEPING if more else _NONE)
    dropped, changed = _UNDER_PREFIX if place.prefix else _ALONE
    lines = [b"HTTP/1.1 %d %s" % (head.status, head.reason)]
    for lower, name, value in head.fields.listed:
        if lower in dropped or lower in named or lower.startswith(_ORDERS_BEGIN):
            continue
        if more and lower.endswith(_KEEPING_ENDS):
            continue
        if lower in changed:
            value = _led(lower, value, place) if lower in _ADDRESSES else _own_alone(lower, value, place)
            if not value:
                continue
        lines.append(name + b": " + value)
    if upgrade:
        lines += [b"Connection: Upgrade", b"Upgrade: websocket"]
    elif head.status >= 200:
        if body == CHUNKED:
            lines.append(b"Transfer-Encoding: chunked")
        if close:
            lines.append(b"Connection: close")
    lines.append((more + b"Cache-Control: no-store\r\n" if more else b"") + b"\r\n")
    return b"\r\n".join(lines)


def _own_alone(name: bytes, value: bytes, place: Place) -> bytes:
    """What is about an origin, so that it is about this address alone; nothing where nothing of it is."""
    if name == b"set-cookie":
        cookie = _host_only(value)
        return _under_prefix(cookie, place) if place.prefix and cookie else cookie
    if name == b"www-authenticate":
        return _own_realm(value, place)
    return _cleared(value) if name == b"clear-site-data" else place.prefix.encode() + b"/"


def _cleared(what: bytes) -> bytes:
    """A Clear-Site-Data without cookies: browsers take that for all names of a domain, the host's own included."""
    listed = [word.strip(b" \t") for word in what.split(b",")]
    if b'"*"' in listed:
        listed += [b'"cache"', b'"storage"', b'"executionContexts"']
    return b", ".join(dict.fromkeys(word for word in listed if word in _CLEARED))


def _host_only(cookie: bytes) -> bytes:
    """A Set-Cookie for this address alone, whatever Domain it names; nothing where it is like an entrance's."""
    pair, *attributes = cookie.split(b";")
    if is_ours(pair):
        return b""
    return b";".join([pair, *(each for each in attributes if _attribute(each) != b"domain")])


def _attribute(each: bytes) -> bytes:
    return each.split(b"=")[0].strip(b" \t").lower()


def _under_prefix(cookie: bytes, place: Place) -> bytes:
    """A Set-Cookie whose Path is under the prefix. Without one it is that of the request, which is there anyway.

    Browsers take a name that begins with `__Host-` with the path / alone, so it gets another one.
    """
    pair, *attributes = cookie.split(b";")
    paths = [each.partition(b"=")[2].strip(b" \t") for each in attributes if _attribute(each) == b"path"]
    kept = [each for each in attributes if _attribute(each) != b"path"]
    if paths and paths[-1].startswith(b"/"):  # of several the last one counts; what is no path, counts as none
        path = paths[-1]
        own = place.prefix.encode()
        if not (path + b"/").startswith(own + b"/"):  # a cookie's has no query
            path = own + (path if place.stripped else b"/")
        kept.append(b" Path=" + path)
    blank = len(pair) - len(pair.lstrip(b" \t"))
    if pair[blank:].lower().startswith(_HOST_NAME):
        pair = _SECURE_NAME[: -len(b"Host-")] + pair[blank + len(b"__") :]
    return b";".join([pair, *kept])


def _host_names_back(cookies: bytes) -> bytes:
    """A Cookie field in which such cookies have the names that the service has given them."""
    if _SECURE_NAME.lower() not in cookies.lower():
        return cookies
    pairs = [each.strip(b" \t") for each in cookies.split(b";")]
    dropped = len(_SECURE_NAME) - len(b"Host-")
    back = (b"__" + each[dropped:] if each.lower().startswith(_SECURE_NAME.lower()) else each for each in pairs)
    return b"; ".join(back)


def _own_realm(challenge: bytes, place: Place) -> bytes:
    """A WWW-Authenticate whose realm no other app has: browsers send what was typed for one to all of its name.

    What asks for a password in the plain (RFC 7617) is written anew, so that nobody reads another realm in it.
    """
    if not _BASIC.search(challenge):
        return challenge
    realm, charset = _REALM.search(challenge), b', charset="UTF-8"' if b"utf-8" in challenge.lower() else b""
    return b'Basic realm="%s %s"%s' % (realm[1] if realm else b"", place.prefix.encode(), charset)


@lru_cache(maxsize=256)
def _inner_addresses(port: int) -> re.Pattern[bytes]:
    number = rb"(?::80)?" if port == 80 else b":%d" % port
    return re.compile(rb"(?i)(?:https?:)?//(?:localhost|127\.0\.0\.1|\[::1\]|0\.0\.0\.0)" + number + rb"(?=[/?#]|$)")


def _led(name: bytes, value: bytes, place: Place) -> bytes:
    """A field of an answer with addresses, as they are outside."""
    if name == b"link":  # RFC 8288 section 3
        return _LINKED.sub(lambda match: match[1] + _outside(match[2], place), value)
    if name != b"refresh":
        return _outside(value, place)
    match = _REFRESH.match(value)
    assert match is not None  # it matches nothing at all, too
    before, address = match[0], value[match.end() :]
    quote = address[:1] if address[:1] in (b"'", b'"') else b""
    if not quote:
        return before + _outside(address, place)
    address, mark, after = address[1:].partition(quote)
    return before + quote + _outside(address, place) + mark + after


def _outside(location: bytes, place: Place) -> bytes:
    """A Location as it is outside, where it names the service by an address that it has inside, or by a path."""
    match = _inner_addresses(place.port).match(location)
    origin = place.origin.encode()
    if match is not None:
        return origin + _outer_path(location[match.end() :], place)
    if not place.stripped:
        return location
    if location.startswith(origin + b"/"):  # a service that is told of the origin by X-Forwarded-Host, or its Host
        return origin + _outer_path(location[len(origin) :], place)
    network_path = location[1:2] in (b"/", b"\\")  # to browsers both begin another address
    return _outer_path(location, place) if location.startswith(b"/") and not network_path else location


def _outer_path(path: bytes, place: Place) -> bytes:
    """A path of the service as browsers have it. It may have the prefix: X-Forwarded-Prefix has told it."""
    return path if place.has(path) else place.stripped + path
