"""Downloads from addresses that may be hostile: bounded in size, and checked again at each redirect."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any, BinaryIO

from huggingface_hub.utils import httpx

from .media_limits import get_media_limits

MAX_REDIRECTS = 20
# A network that speaks IPv6 alone shows every IPv4 address inside this one.
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_address(source: Any) -> bool:
    """Whether this is an http(s) address."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def check_address(address: str, *, is_redirect: bool = False) -> None:
    """Refuse an address that the `MediaLimits` in force do not allow. Nothing is sent to it.

    Args:
        address (str): to be asked.
        is_redirect (bool): whether a server named it. The caller is trusted with more.

    Raises:
        ValueError: it is no http(s) address, `allow_address` says no, or it is private where only public ones may be
            asked. The message does not repeat the whole address.
    """
    limits = get_media_limits()
    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"it is no valid address: {error}") from error
    whose = "a redirect leads to" if is_redirect else "it has"
    if url.scheme not in ("http", "https"):
        raise ValueError(f"{whose} the scheme {url.scheme + '://'!r}, and only http:// and https:// can be asked")
    host = url.raw_host.decode("ascii")  # as it is looked up
    if not host:
        raise ValueError(f"{whose} an address without a host")
    if limits.allow_address is not None and not limits.allow_address(str(url)):  # as httpx reads it
        raise ValueError(f"{whose} an address that `MediaLimits.allow_address` does not allow (host {host!r})")
    if not _must_be_public(is_redirect):
        return
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, url.port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        if limits.private_addresses == "never":
            raise ValueError(f"the host {host!r} cannot be looked up: {error}") from error
        return  # a proxy may know it; without one the request fails anyway
    if not all(map(_is_public, found)):
        raise ValueError(f"{whose} the private host {host!r} {_hint()}")


def _must_be_public(is_redirect: bool) -> bool:
    rule = get_media_limits().private_addresses
    return rule == "never" or (rule == "given" and is_redirect)


def _hint() -> str:
    return f"(`MediaLimits.private_addresses` is {get_media_limits().private_addresses!r})"


def _is_public(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])  # %: the network card of a link-local address
    if address.version == 6:
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in NAT64:
            address = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast


def _watch_connection(host: str) -> Callable[[str, dict[str, Any]], None]:
    """A callback for httpx that refuses a private peer before anything is sent to it.

    A hostile name server may give a public address to `check_address` and a private one to the connection.
    """
    asked = None

    def watch(event: str, info: dict[str, Any]) -> None:
        nonlocal asked
        if event == "connection.connect_tcp.started":
            asked = info["host"]
        # a proxy, which has another name, looks the host up on its own
        elif event == "connection.connect_tcp.complete" and asked == host:
            peer = info["return_value"].get_extra_info("server_addr")[0]
            if not _is_public(peer):
                info["return_value"].close()
                raise ValueError(f"the host {host!r} leads to the private address {peer} {_hint()}")

    return watch


def download(address: str, file: BinaryIO) -> None:
    """Write what an http(s) address answers to an open file, within the `MediaLimits` in force.

    Args:
        address (str): to be asked.
        file (BinaryIO): open for writing.

    Raises:
        ValueError: the address, or one that it redirects to, is not allowed (see `check_address`), the answer is an
            error or too large.
        httpx.HTTPError: the host cannot be reached or breaks off.
    """
    with httpx.Client(headers={"Accept-Encoding": "identity"}) as client:
        for hop in range(MAX_REDIRECTS + 1):
            is_redirect = hop > 0
            check_address(address, is_redirect=is_redirect)
            request = client.build_request("GET", address)
            if _must_be_public(is_redirect):
                request.extensions["trace"] = _watch_connection(request.url.raw_host.decode("ascii"))
            response = client.send(request, stream=True, follow_redirects=False)
            try:
                if not response.has_redirect_location:
                    return _write_body(response, file)
                address = str(response.url.join(response.headers["location"]))
            finally:
                response.close()
    raise ValueError(f"it redirects more than {MAX_REDIRECTS} times")


def _write_body(response: Any, file: BinaryIO) -> None:
    if not response.is_success:
        raise ValueError(f"the host answers {response.status_code} {response.reason_phrase}")
    # httpx unpacks 64 KiB at once: gzip and deflate make 64 MiB of that at most, other encodings any number of bytes.
    encoding = response.headers.get("content-encoding", "identity")
    if encoding not in ("identity", "gzip", "deflate"):
        raise ValueError(f"the host answers with the content encoding {encoding!r}, which was not asked for")
    limit = get_media_limits().max_download_bytes
    size = 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if limit is not None and size > limit:
            raise ValueError(f"it holds more than the {limit} bytes that `MediaLimits.max_download_bytes` allows")
        file.write(chunk)
