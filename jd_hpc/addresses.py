"""Which addresses this machine has, as far as the kernel says.

No name server is asked: one that does not answer would hold up the start of a run by many seconds.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

LOOPBACK: Final = "127.0.0.1"
MOST_ADDRESSES: Final = 16
"""A slave that tries more than so many addresses has little time for each."""

SIOCGIFADDR: Final = 0x8915
IPV6_TABLE: Final = Path("/proc/net/if_inet6")
IPV6_GLOBAL: Final = 0x00
IPV6_UNUSABLE: Final = 0x48
"""Flags of an address: still being tried (0x40), or found to be somebody else's (0x08)."""


def find_addresses(ipv6: bool = True) -> list[str]:
    """Return this machine's addresses without loopback, the most promising first.

    Parameters
    ----------
    ipv6 : bool
        Whether those of IPv6 are wanted too, after the others.

    Returns
    -------
    list of str
        At most MOST_ADDRESSES, as numbers; empty on a machine with no network.
    """
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Of documentation's network: nothing is sent, the kernel only chooses the interface that leads out.
            probe.connect(("203.0.113.1", 9))
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no way out
        found += _ipv4_addresses(probe)
    if ipv6:
        found += _ipv6_addresses()
    usable = [host for host in dict.fromkeys(found) if not ipaddress.ip_address(host).is_loopback]
    return usable[:MOST_ADDRESSES]


def _ipv4_addresses(probe: socket.socket) -> Iterator[str]:
    """The first address of every interface that has one: netdevice(7)."""
    for _, interface in socket.if_nameindex():
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            continue
        yield socket.inet_ntoa(answer[20:24])


def _ipv6_addresses() -> Iterator[str]:
    """Every global address. Link-local ones mean nothing on another host: they need the name of an interface there."""
    try:
        lines = IPV6_TABLE.read_text().splitlines()
    except OSError:
        return  # no IPv6
    for line in lines:
        digits, _, _, scope, flags, _ = line.split()
        if int(scope, 16) == IPV6_GLOBAL and not int(flags, 16) & IPV6_UNUSABLE:
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
