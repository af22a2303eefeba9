"""A proxy on the loopback in front of a real server, which spoils the replies that a test wants spoilt."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = 'sk-only-in-the-environment'
Fault = Callable[['_Handler', int, bytes], None]


class FaultyProxy:
    """Forwards to ``upstream``; POST requests that score or generate go through the faults first, one fault each, in order.

    Attributes:
        faults: What happens to the next requests; None lets one through. A test may change it at any time.
        afterwards: What happens when no fault is left.
        seen: Bodies of the requests that came.
    """

    def __init__(self, upstream: str):
        self.upstream, self.faults, self.afterwards, self.seen = upstream, [], None, []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'proxy': self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'

    def next_fault(self, body: dict) -> Fault | None:
        with self._lock:
            self.seen.append(body)
            return self.faults.pop(0) if self.faults else self.afterwards

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    proxy: FaultyProxy

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._forward(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers['Content-Length']))
        content = json.loads(body)
        counts = 'prompt_logprobs' in json.dumps(content) or 'max_tokens' in json.dumps(content)
        fault = self.proxy.next_fault(content) if counts and self.path != '/tokenize' else None
        if fault is dead:
            return fault(self, 0, b'')
        self._forward(body, fault)

    def _forward(self, body: bytes | None, fault: Fault | None = None) -> None:
        headers = {name: self.headers[name] for name in ('Content-Type', 'Authorization') if self.headers[name]}
        request = urllib.request.Request(self.proxy.upstream + self.path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                status, content = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        (fault or send)(self, status, content)


def send(handler: _Handler, status: int, content: bytes) -> None:
    handler.send_response(status)
    handler.send_header('Content-Type', 'application/json')
    handler.send_header('Content-Length', str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def error_500(handler: _Handler, status: int, content: bytes) -> None:
    send(handler, 500, b'{"message": "out of memory"}')


def late(seconds: float) -> Fault:
    def fault(handler: _Handler, status: int, content: bytes) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return fault


def cut(handler: _Handler, status: int, content: bytes) -> None:
    """The connection ends in the middle of the reply."""
    handler.send_response(status)
    handler.send_header('Content-Length', str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.close()


def dead(handler: _Handler, status: int, content: bytes) -> None:
    """No reply at all."""
    handler.close_connection = True
    handler.connection.close()


def changed(change: Callable[[list], list]) -> Fault:
    """A well-formed reply whose prompt_logprobs are changed."""

    def fault(handler: _Handler, status: int, content: bytes) -> None:
        reply = json.loads(content)
        holder = reply[0] if isinstance(reply, list) else reply['choices'][0]
        holder['prompt_logprobs'] = change(holder['prompt_logprobs'])
        send(handler, status, json.dumps(reply).encode())

    return fault


short = changed(lambda entries: entries[:-2])
missing = changed(lambda entries: [*entries[:-1], None])
not_a_number = changed(lambda entries: [*entries[:-1], {i: {**e, 'logprob': float('nan')} for i, e in entries[-1].items()}])
other_tokens = changed(lambda entries: [entries[0], *({str(int(i) + 100000): e for i, e in d.items()} for d in entries[1:])])
too_few = changed(lambda entries: [None, *(dict(list(d.items())[:1]) for d in entries[1:])])
