"""A web server on this machine that misbehaves as told."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Serves ``files`` (path without the leading slash -> bytes) until the with block ends.

    The next ``faulty`` answers (-1: all) that give a shard send ``after`` bytes of what was asked for, wait ``stall``
    seconds and close the connection; ``extra`` is added to the length that they state. Before these, a shard's request
    is answered with each of ``statuses``. ``ranges``: whether range requests are known; ``states_length``: whether
    answers say how long they are. ``requests`` collects (path, first byte).
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.faulty, self.after, self.stall, self.extra = 0, 2**62, 0.0, 0
        self.statuses: list[int] = []
        self.ranges = self.states_length = True
        self.requests: list[tuple[str, int]] = []
        self._closing = threading.Event()
        handler = type("Handler", (_Handler,), {"faults": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    faults: FaultyServer

    def do_GET(self) -> None:
        faults, path = self.faults, self.path.partition("?")[0].lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and faults.ranges else 0
        faults.requests.append((path, int(asked[1]) if asked else 0))
        body = faults.files.get(path)
        if body is None or (faults.statuses and path.endswith(".tar")):
            self.send_error(faults.statuses.pop(0) if body is not None else 404)
            return
        if asked and faults.ranges and start >= len(body):
            self.send_error(416)
            return
        is_faulty = faults.faulty != 0 and path.endswith((".tar", ".gz", ".xz"))
        faults.faulty -= is_faulty
        self.send_response(206 if asked and faults.ranges else 200)
        if faults.states_length:
            self.send_header("Content-Length", str(len(body) - start + is_faulty * faults.extra))
        self.end_headers()
        body = body[start : start + faults.after] if is_faulty else body[start:]
        try:
            self.wfile.write(body)
        except ConnectionError:  # the client stopped reading
            return
        if is_faulty and faults.stall:
            self.wfile.flush()
            faults._closing.wait(faults.stall)

    def log_message(self, *_) -> None:
        pass
