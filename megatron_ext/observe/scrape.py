"""The HTTP endpoint that Prometheus scrapes: GET /metrics, in a thread of its own.

It answers at the address it was told and nowhere else, tells nothing but the metrics, and knows no password: whoever reaches the address reads
them. A slow or silent client holds a thread for ten seconds, never the training.
"""
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Endpoint:
    """A server at `address` (host, port; 0 = a port of the system's choice). `.port` is the one it has.

    Args:
        text: called for each request, in another thread.

    Raises:
        OSError: the address is not ours, or in use.
    """

    def __init__(self, address: tuple[str, int], text: Callable[[], str]):
        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404, "the metrics are at /metrics")
                    return
                body = text().encode("utf-8")
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """A scrape every few seconds is no news."""

            def version_string(self) -> str:
                return "megatron-ext"

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            daemon_threads = True

            def server_bind(self) -> None:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.socket.bind(self.server_address)  # the base class also asks the name service who we are, which can take seconds
                self.server_address = self.socket.getsockname()
                self.server_name, self.server_port = self.server_address[:2]

            def handle_error(self, *_: object) -> None:
                """A client that hangs up is its own affair."""

        try:
            self._server = Server(address, Handler)
        except OverflowError as error:
            raise OSError(str(error)) from None
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="prometheus", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
