"""Contracts: what one process of the shop needs of another, each as plain JSON in tests/contracts.

A contract lists interactions, in an order that a fresh provider with the seed's rows can live through. Content is
JSON, and comes as application/json. An answer names what the consumer needs of it and no more: a provider may say
more. Where any value will do, it says "<any>".

    replay()   asks the real provider, which fails where it no longer keeps the contract
    served()   is a stub that keeps it, for the tests of the consumer, which fails where it asks for anything else
"""
import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import TestCase

from tests.helpers import PATIENCE, TOP, ask

FOLDER = TOP / "tests" / "contracts"
ANY = "<any>"


def load(name: str) -> dict:
    """Return the contract of a pair, like "orders-products"."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def fits(wanted: Any, found: Any) -> bool:
    """Tell whether a value is as agreed on; members of an object that nobody needs may be there too."""
    if wanted == ANY:
        return found is not None
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(fits(value, found.get(name)) for name, value in wanted.items())
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(fits, wanted, found))
    return type(wanted) is type(found) and wanted == found  # 1 is neither True nor 1.0 in JSON


def whole(message: dict) -> dict:
    """Spell out the headers and the content of a request or an answer."""
    json_type = {"content-type": "application/json"} if "method" in message and "content" in message else {}
    return {"content": None, **message, "headers": {**json_type, **message.get("headers", {})}}


def replay(case: TestCase, contract: dict, port: int) -> None:
    """Ask for one after the other at a port, and compare what is answered."""
    for interaction in contract["interactions"]:
        request, answer = whole(interaction["request"]), whole(interaction["answer"])
        with case.subTest(f"{contract['provider']}: {interaction['what']}"):
            body = None if request["content"] is None else json.dumps(request["content"]).encode()
            found = ask(port, request["method"], request["target"], request["headers"], body)
            case.assertEqual(found.status, answer["status"], found.body)
            case.assertTrue(fits(answer["headers"], found.headers), found.headers)
            if answer["content"] is not None:
                case.assertTrue(fits(answer["content"], found.json), found.body)


class Stub(ThreadingHTTPServer):
    """Keeps a contract: answers exactly its requests. One that comes again gets the next answer to it, if any."""

    daemon_threads = False  # server_close() waits for each

    def __init__(self, contract: dict):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.interactions = contract["interactions"]
        self.unasked = list(self.interactions)
        self.unknown: list[dict] = []
        self._lock = threading.Lock()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the host's name

    def find_response(self, request: dict) -> dict:
        with self._lock:
            known = [interaction for interaction in self.interactions if fits(whole(interaction["request"]), request)]
            if not known:
                self.unknown.append(request)
                return whole({"status": 500})
            found = next((interaction for interaction in known if interaction in self.unasked), known[-1])
            self.unasked = [interaction for interaction in self.unasked if interaction is not found]
            return whole(found["answer"])


class StubHandler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    disable_nagle_algorithm = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = self.server.find_response({
            "method": self.command, "target": self.path, "content": json.loads(body) if body else None,
            "headers": {name.lower(): value for name, value in self.headers.items()}})
        content = b"" if answer["content"] is None else json.dumps(answer["content"]).encode()
        self.send_response(answer["status"])
        for name, value in answer["headers"].items():
            self.send_header(name, value)
        if answer["status"] != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(contract: dict) -> Iterator[Stub]:
    """Serve a contract in a thread of this process. Raises AssertionError where something else was asked for."""
    stub = Stub(contract)
    thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        thread.join()
        stub.server_close()
    if stub.unknown:
        raise AssertionError(f"not in the contract with {contract['provider']}: {stub.unknown}")
