"""A service and a gateway as textbooks write them: http.server and urlopen as they are.

tests/bench.py compares the shop's speed with theirs; the tour shows them under the same faults.

    python -m tests.textbook users 0
    python -m tests.textbook http://localhost:3001 0
"""
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

USERS = b'[{"id":1,"name":"Alice"},{"id":2,"name":"Bob"}]'
UPSTREAM = sys.argv[1]


class TextbookHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = USERS if UPSTREAM == "users" else urlopen(UPSTREAM + self.path).read()
        self.send_response(200)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), TextbookHandler)
    print(f"textbook listening at http://localhost:{server.server_port}", flush=True)
    server.serve_forever()
