"""uvicorn's HTTP protocol with an end to its patience.

uvicorn waits for ever for the rest of a request, and for ever until an answer is read: a few hundred connections that send a byte now and then
(slowloris), or nothing at all, would take all descriptors and lock everyone out. Here a connection is cut off when it has not
finished a request for a while, and when there are too many, the one goes that has not for longest.
"""
import asyncio
import socket

PATIENCE = 60.0  # seconds in which a request has to come whole, and its answer to be read
MOST = 256  # connections at a time


def protocol(patience: float = PATIENCE, most: int = MOST) -> type:
    """A class for `uvicorn.Config(http=...)`."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    open_: dict[asyncio.Protocol, None] = {}  # the one that finished a request (or came) longest ago first

    class Patient(H11Protocol):
        _end: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            # asyncio does it for sockets whose protocol is told, which those of socket.create_server is not: head and body of each answer go out on
            # their own, and the body would wait 40 ms for the head to be acknowledged.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._renew()
            while len(open_) > most:
                (oldest := next(iter(open_)))._forget()
                oldest.transport.abort()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self in open_:
                self._renew()

        def connection_lost(self, exc) -> None:
            self._forget()
            super().connection_lost(exc)

        def _renew(self) -> None:
            self._forget()
            open_[self] = None
            self._end = self.loop.call_later(patience, self.transport.abort)

        def _forget(self) -> None:
            open_.pop(self, None)
            if self._end is not None:
                self._end.cancel()

    return Patient
