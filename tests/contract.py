"""Contracts: what one process of the shop needs of another, as plain JSON in tests/contracts.

A contract has the name `consumer-provider.json`. It lists interactions, in an order in which a
fresh provider with the seed's rows can answer them. Content is JSON, with the type
application/json. An answer names only what the consumer needs of it, and a provider may answer
more. "<any>" stands for any value. (This is consumer-driven contract testing, without a tool.)

    replay()   sends the requests to the real provider; fails if it no longer keeps the contract
    served()   runs a stub that keeps the contract; fails if the consumer asks for anything else

For each service there is at least gateway-<service>.json, with GET /health and GET /<service>.
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
    """Return the contract of a pair, like "orders-products".

    Raises AssertionError if it lacks what the gateway needs of every service.
    """
    contract = json.loads((FOLDER / f"{name}.json").read_text())
    consumer, _, provider = name.partition("-")
    if consumer == "gateway":
        asked = [(each["request"]["method"], each["request"]["target"])
                 for each in contract["interactions"]]
        for target in ("/health", f"/{provider}"):
            if ("GET", target) not in asked:
                raise AssertionError(f"tests/contracts/{name}.json has no interaction for GET "
                                     f"{target}: the gateway needs that of {provider}")
    return contract


def fits(wanted: Any, found: Any) -> bool:
    """Tell whether a value is as agreed; objects may have members that the consumer ignores."""
    return not list(differences(wanted, found))


def differences(wanted: Any, found: Any, path: str = "") -> Iterator[str]:
    """Yield a sentence for each place where a value is not as agreed, with the path to it."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name, value in wanted.items():
            inner = f"{path}.{name}".removeprefix(".")
            if name in found or value is None:
                yield from differences(value, found.get(name), inner)
            else:
                yield f"{inner} is missing; agreed is {json.dumps(value)}"
    elif isinstance(wanted, list) and isinstance(found, list):
        if len(wanted) != len(found):
            yield f"{path or 'it'} has {len(found)} items, not {len(wanted)}: {json.dumps(found)}"
        for number, (value, other) in enumerate(zip(wanted, found, strict=False)):
            yield from differences(value, other, f"{path}[{number}]")
    elif not fits_plainly(wanted, found):
        yield f"{path or 'it'} is {json.dumps(found)}; agreed is {json.dumps(wanted)}"


def fits_plainly(wanted: Any, found: Any) -> bool:
    if wanted == ANY:
        return found is not None
    return type(wanted) is type(found) and wanted == found  # in JSON, 1 is neither true nor 1.0


def complete(message: dict) -> dict:
    """Return a request or an answer with its headers and content spelled out."""
    is_request = "method" in message
    has_content = "content" in message
    json_type = {"content-type": "application/json"} if is_request and has_content else {}
    return {"content": None, **message, "headers": {**json_type, **message.get("headers", {})}}


def replay(case: TestCase, contract: dict, port: int) -> None:
    """Send each request of a contract to a port, and compare the answers."""
    for interaction in contract["interactions"]:
        request, answer = complete(interaction["request"]), complete(interaction["answer"])
        content = request["content"]
        body = None if content is None else json.dumps(content).encode()
        asked = f"{request['method']} {request['target']}"
        with case.subTest(f"{contract['provider']}: {interaction['what']}"):
            found = ask(port, request["method"], request["target"], request["headers"], body)
            case.assertEqual(found.status, answer["status"], f"status of {asked}: {found.body}")
            different = [f"headers: {each}"
                         for each in differences(answer["headers"], found.headers)]
            if answer["content"] is not None:
                different += [f"body: {each}"
                              for each in differences(answer["content"], found.json)]
            if different:
                case.fail("\n".join([
                    f"the answer to {asked} is not as agreed in tests/contracts/"
                    f"{contract['consumer']}-{contract['provider']}.json", *different]))


class Stub(ThreadingHTTPServer):
    """Answers exactly the requests of a contract.

    If the same request is listed several times, the first gets the first answer, and so on.
    """

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

    def find_answer(self, request: dict) -> dict:
        with self._lock:
            known = [interaction for interaction in self.interactions
                     if fits(complete(interaction["request"]), request)]
            if not known:
                self.unknown.append(request)
                return complete({"status": 500})
            unasked = [interaction for interaction in known if interaction in self.unasked]
            chosen = unasked[0] if unasked else known[-1]
            self.unasked = [interaction for interaction in self.unasked
                            if interaction is not chosen]
            return complete(chosen["answer"])


class StubHandler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    disable_nagle_algorithm = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = self.server.find_answer({
            "method": self.command, "target": self.path,
            "content": json.loads(body) if body else None,
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
    """Run a stub in a thread of this process. Raises AssertionError for any other request."""
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
