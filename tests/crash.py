"""A service that names its steps and kills itself at a chosen one: no product code, but what tests/test_crash.py runs.

A step is a durable write (Database.write), a statement of a transaction (Database.transaction) or a call to another
service (Client.call): between two of them nothing happens that outlives the process. So whoever dies before and
after each of them has died everywhere.

`python -m tests.crash` reads runs from standard input, a line of JSON each, and prints what becomes of them. Each run
is a fork of this one process, which has imported all there is to import: that is what makes hundreds of them quick.
"""
import contextlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from microshop import orders
from microshop.chassis.client import Client
from microshop.chassis.database import Database
from microshop.chassis.server import Service
from microshop.orders import Orders
from microshop.products import Products

Service.allow_reuse_port = True  # the tests hold the port meanwhile
SERVICES = {"orders": Orders, "products": Products}
PATIENCE = 10  # seconds after which a run that hangs is ended
STATEMENT = re.compile(r"(UPDATE) (\w+) (SET \w+)|(INSERT|SELECT|DELETE)\b.*?(?:INTO|FROM) (\w+)|(\w+)", re.S)


class Steps:
    """The steps of a process. `death` is where it dies: the number of a step, and "before" or "after" it."""

    def __init__(self, death: list | None):
        self.death = death
        self.count = 0
        self._within = threading.local()  # a write is one step, the transaction in it too

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        number, self.count = self.count, self.count + 1
        say(f"step {name}")
        self._pass(number, "before")
        try:
            yield
        finally:  # a call that fails has an end, too
            self._pass(number, "after")

    def _pass(self, number: int, side: str) -> None:
        if [number, side] == self.death:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Make a step of all that outlives this process, from here on."""
        write, transaction, call = Database.write, Database.transaction, Client.call

        def write_stepwise(database, statement, values=()):
            with self.step(f"write: {name_of(statement, values)}"):
                self._within.a_write = True
                try:
                    return write(database, statement, values)
                finally:
                    del self._within.a_write

        @contextlib.contextmanager
        def transaction_stepwise(database):
            connection = database.connection()
            if hasattr(self._within, "a_write"):
                with transaction(database):
                    yield connection
                return
            with contextlib.ExitStack() as current:  # the step that is being taken: each ends where the next begins

                def go_on(statement):
                    current.close()
                    current.enter_context(self.step(name_of(statement)))

                connection.set_trace_callback(go_on)  # called before each statement, BEGIN and COMMIT among them
                try:
                    with transaction(database):
                        yield connection
                finally:
                    connection.set_trace_callback(None)

        def call_stepwise(client, upstream, method, *rest):
            with self.step(f"call: {method} {upstream.name}"):
                return call(client, upstream, method, *rest)

        Database.write, Database.transaction, Client.call = write_stepwise, transaction_stepwise, call_stepwise


def say(line: str) -> None:
    """Print a line in one piece: threads print here at the same time."""
    os.write(1, f"{line}\n".encode())


def name_of(statement: str, values: dict | tuple = ()) -> str:
    """Name a statement by its verb, its table, the first column it sets and, where that is the status, by that."""
    name = " ".join(filter(None, STATEMENT.match(statement).groups()))
    return f"{name} = {values['status']}" if name.endswith("SET status") else name


def serve(service: str, data: str, death: list | None, resumes: bool, **settings) -> None:
    """Run a service. One that `resumes` goes on with what it finds; else it only answers, and its start is no step."""
    say(f"runs as {os.getpid()}")
    signal.alarm(PATIENCE)
    orders.LOOK = 0.01 if resumes else 3600.0  # seconds: nobody in the background may blur the steps of a request
    steps = Steps(death)
    if resumes:
        steps.watch()
    running = SERVICES[service](Namespace(host="127.0.0.1", data=Path(data), timeout=5.0, quiet=True, supervised=None,
                                          grace=4.0, max_connections=100, **settings))
    if not resumes:
        steps.watch()
    running.run()


def main() -> None:
    for line in sys.stdin:
        if child := os.fork():
            say(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
            continue
        try:
            serve(**json.loads(line))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


if __name__ == "__main__":
    main()
