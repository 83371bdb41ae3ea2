# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""A web server whose answers say what it got: ``GET`` its name, ``PUT`` and ``POST`` the SHA-256 of the body.

``GET /bytes/N`` has so many bytes, a multiple of 256.

    python web_server.py NAME PORT [CERTIFICATE]

With a certificate (a PEM file with its key) it speaks TLS, HTTP/1.1 only.
"""

from __future__ import annotations

import hashlib
import http.server
import socket
import ssl
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    name = ""

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Server", self.name)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """The server's name, or so many bytes."""
        if self.path.startswith("/bytes/"):
            self._answer(bytes(range(256)) * (int(self.path[7:]) // 256))
        else:
            self._answer(f"{self.name}\n".encode())

    def do_PUT(self) -> None:
        """The digest of the body."""
        digest, left = hashlib.sha256(), int(self.headers["Content-Length"])
        while left:
            part = self.rfile.read(min(left, 1 << 16))
            if not part:
                return
            digest.update(part)
            left -= len(part)
        self._answer(f"{digest.hexdigest()}\n".encode())

    do_POST = do_PUT

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """On all addresses of both families."""

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 1024


def main() -> None:
    """See the module."""
    Handler.name = sys.argv[1]
    server = Server(("::", int(sys.argv[2])), Handler)
    if len(sys.argv) > 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[3])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
