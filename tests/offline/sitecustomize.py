"""Blocks every connection but to this machine. Imported by the tests and, through PYTHONPATH, by every process they start."""

import socket

_LOCAL = ("127.", "::1", "localhost")


def _is_local(address: object) -> bool:
    return not isinstance(address, tuple) or str(address[0]).startswith(_LOCAL)


def _guard(name: str) -> None:
    original = getattr(socket.socket, name)

    def guarded(self: socket.socket, address: object, *rest: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address):
            raise OSError(f"the tests run without a network, and {address} was asked for")
        return original(self, address, *rest)

    setattr(socket.socket, name, guarded)


def _resolve(host: object, *rest: object, **more: object) -> object:
    if host is not None and not str(host).startswith(_LOCAL):
        raise OSError(f"the tests run without a network, and the address of {host} was asked for")
    return _getaddrinfo(host, *rest, **more)


_getaddrinfo = socket.getaddrinfo
socket.getaddrinfo = _resolve
_guard("connect")
_guard("connect_ex")
