"""Downloads from addresses that may be hostile: the size is bounded, and each redirect is checked again."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any, BinaryIO

from huggingface_hub.utils import httpx

from .media_limits import get_media_limits

MAX_REDIRECTS = 20
# A network with only IPv6 maps every IPv4 address into this network.
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_address(source: Any) -> bool:
    """Whether this is an http(s) address."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def check_address(address: str, *, is_redirect: bool = False) -> None:
    """Refuses an address that the `MediaLimits` in force do not allow, before anything is sent to it.

    Args:
        address (str): The address to check.
        is_redirect (bool): Whether a server named the address. The limits allow more to the caller than to a server.

    Raises:
        ValueError: The address is not an http(s) address, `allow_address` refuses it, or it is private and the limits
            allow only public addresses. The message does not repeat the whole address.
    """
    limits = get_media_limits()
    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"it is no valid address: {error}") from error
    whose = "a redirect leads to" if is_redirect else "it has"
    if url.scheme not in ("http", "https"):
        raise ValueError(f"{whose} the scheme {url.scheme + '://'!r}, and only http:// and https:// are supported")
    host = url.raw_host.decode("ascii")  # the form in which it is looked up
    if not host:
        raise ValueError(f"{whose} an address without a host")
    if limits.allow_address is not None and not limits.allow_address(str(url)):  # normalised by httpx
        raise ValueError(f"{whose} an address that `MediaLimits.allow_address` does not allow (host {host!r})")
    if not _must_be_public(is_redirect):
        return
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, url.port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        if limits.private_addresses == "never":
            raise ValueError(f"the host {host!r} cannot be looked up: {error}") from error
        return  # a proxy may know the host; without a proxy the request fails anyway
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
    """Makes a callback for httpx that refuses a private peer before anything is sent to it.

    A hostile name server may give a public address to `check_address` and a private one to the connection.
    """
    target = None

    def watch(event: str, info: dict[str, Any]) -> None:
        nonlocal target
        if event == "connection.connect_tcp.started":
            target = info["host"]
        # a connection to a proxy has a different name, and the proxy looks the host up by itself
        elif event == "connection.connect_tcp.complete" and target == host:
            peer = info["return_value"].get_extra_info("server_addr")[0]
            if not _is_public(peer):
                info["return_value"].close()
                raise ValueError(f"the host {host!r} leads to the private address {peer} {_hint()}")

    return watch


def download(address: str, file: BinaryIO) -> None:
    """Writes the answer of an http(s) address to an open file, within the `MediaLimits` in force.

    Args:
        address (str): The address to read.
        file (BinaryIO): A file that is open for writing.

    Raises:
        ValueError: The address or one of its redirects is not allowed (see `check_address`), or the answer is an error
            or too large.
        httpx.HTTPError: The host cannot be reached, or it breaks the connection.
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
    # httpx decompresses 64 KiB at a time. With gzip and deflate that yields at most 64 MiB, with other encodings any
    # number of bytes.
    encoding = response.headers.get("content-encoding", "identity")
    if encoding not in ("identity", "gzip", "deflate"):
        raise ValueError(f"the host answers with the content encoding {encoding!r}, which the request did not accept")
    limit = get_media_limits().max_download_bytes
    size = 0
    for chunk in response.iter_bytes():
        size += len(chunk)
        if limit is not None and size > limit:
            raise ValueError(f"it holds more than the {limit} bytes that `MediaLimits.max_download_bytes` allows")
        file.write(chunk)
