"""Stands for a server of ms-swift: ``python -m fake_server --host H --port P --model fails|ends|answers``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def fail(what: str) -> None:
    print(f'Traceback …\n{what}', file=sys.stderr, flush=True)
    os._exit(1)


def end() -> None:
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    for name in ('host', 'port', 'model'):
        parser.add_argument(f'--{name}')
    given, _ = parser.parse_known_args()
    Path(f'pid{given.port}').write_text(str(os.getpid()))
    if given.model == 'fails':
        fail('ValueError: no such model')
    if given.model == 'ends':
        threading.Thread(target=end).start()
    HTTPServer((given.host, int(given.port)), Handler).serve_forever()
