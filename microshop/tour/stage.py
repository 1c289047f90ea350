"""Tour: the verbs that a chapter is written in.

    say         print a paragraph
    predict     ask the reader a question, and wait for Enter if there is a terminal
    curl        print a command that can be copied, send the request, print the answer
    kill, pause, resume, restart        send a signal to a process of the shop
    show_log, show_lines, show_trace, show_order, show_audit    show what the shop knows
    expect      wait until something holds, and say so; Different if it does not
    trade_off   say why it is made this way, and not the obvious other way
"""
import contextlib
import http.client
import json
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from microshop import SERVICES
from microshop.tour import drawing
from microshop.tour.drawing import Answer
from microshop.tour.own_shop import PATIENCE, Different, OwnShop, is_wanted, poll
from microshop.watching.exposition import Metrics, parse_metrics

CURL_ERRORS: dict[type[Exception], str] = {  # what curl prints for them
    http.client.RemoteDisconnected: "(52) Empty reply from server",
    ConnectionResetError: "(56) Recv failure: Connection reset by peer",
    ConnectionRefusedError: "(7) Could not connect to server"}


class Pending:
    """A request whose answer has not come yet; `wait` returns it."""

    def __init__(self, request: str, send: Callable[[], Answer]):
        self.request = request  # like "POST /orders"
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(send()), daemon=True)
        self._thread.start()

    def is_answered(self) -> bool:
        return bool(self._answers)

    def wait(self) -> Answer:
        self._thread.join(PATIENCE)
        if not self._answers:
            raise Different(f"an answer to {self.request}", f"none within {PATIENCE:g} s")
        return self._answers[0]


class Stage:
    """The verbs that say, do and expect something, in the shop that start_shop() has started.

    If it `is_interactive`, questions wait for Enter.
    """

    def __init__(self, stack: contextlib.ExitStack, *, is_interactive: bool):
        self._stack = stack  # ends the shop
        self.is_interactive = is_interactive
        self.watch = ""      # the part of the live picture that shows this, like "#order=203"
        self._is_chosen = False  # if not, that is the last request
        self.shop: OwnShop
        self.also: dict[str, int] = {}  # ports of processes beside the shop, by name

    # --- the shop

    def start_shop(self, *flags: str) -> None:
        """Start a fresh shop, with these flags of run_all, and wait until it is ready."""
        command = " ".join(["python -m microshop.run_all --fresh --port 0",
                            *map(shlex.quote, flags)])
        self.shop = self._stack.enter_context(OwnShop(*flags))
        self.shop.await_line(r"\| ready in ")
        self.shop.port("live")
        self.print(f"(a shop was started for you: {command}")
        self.print(f" its gateway is at http://localhost:{self.port()})\n")

    def port(self, name: str = "gateway") -> int:
        return self.also[name] if name in self.also else self.shop.port(name)

    def kill(self, name: str) -> None:
        """Kill a process: it has no chance to finish anything."""
        self._signal(name, signal.SIGKILL)

    def pause(self, name: str) -> None:
        """Stop a process: it keeps its connections, and does nothing."""
        self._signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._signal(name, signal.SIGCONT)

    def restart(self) -> None:
        """Ask run_all to replace every process (a rolling restart)."""
        self._signal("run_all", signal.SIGHUP)

    def own_folder(self) -> Path:
        """Return a new folder, which is removed when the chapter ends."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tour-")))

    def _signal(self, name: str, number: signal.Signals) -> None:
        pid = self.shop.signal(name, number)
        self.print(drawing.draw_kill(pid, number, name) + "\n")

    # --- words

    def print(self, text: str = "") -> None:
        print(text, flush=True)

    def say(self, text: str) -> None:
        self.print(drawing.draw_text(text) + "\n")

    def predict(self, question: str) -> None:
        self.print(drawing.draw_text(question, "? "))
        if self.is_interactive:
            input("  (think first; Enter goes on) ")
        self.print()

    def trade_off(self, text: str) -> None:
        self.print(drawing.draw_text("Why not do it differently? " + text) + "\n")

    # --- what must come out

    def expect(self, sentence: str, came: Any, wanted: Any) -> Any:
        """Check that what came is what is wanted: a value, or a function that says yes to it.

        If `came` is a function, it is called until it returns what is wanted. Prints the sentence,
        and returns what came. Raises Different.
        """
        if callable(came):
            came = poll(sentence, came, wanted)
        elif not is_wanted(came, wanted):
            raise Different(sentence, came)
        self.print(drawing.draw_text(sentence, "[ok] ") + "\n")
        return came

    def choose_watch(self, watch: str) -> None:
        """Choose the part of the live picture that the chapter's last link leads to."""
        self.watch, self._is_chosen = watch, True

    # --- requests

    def curl(self, target: str, *, method: str = "", headers: dict[str, str] | None = None,
             data: Any = None, to: str = "gateway", show: tuple[str, ...] = ()) -> Answer:
        """Print a command, send its request, and print the answer with the headers in `show`.

        `data` is sent as JSON; `to` is the process that is asked. An answer with status 0 is none.
        """
        pending = self.begin_curl(target, method=method, headers=headers, data=data, to=to, end="")
        return self.finish_curl(pending, show, is_new=True)

    def begin_curl(self, target: str, *, method: str = "", headers: dict[str, str] | None = None,
                   data: Any = None, to: str = "gateway", end: str = " &") -> Pending:
        """Print a command and send its request, without waiting for the answer."""
        body = None if data is None else json.dumps(data, separators=(",", ":"))
        method = method or ("GET" if body is None else "POST")
        fields = {"Content-Type": "application/json"} if body is not None else {}
        fields |= headers or {}
        port = self.port(to)
        command = drawing.draw_curl(f"localhost:{port}{target}", method, fields, body)
        self.print(f"$ {command}{end}" + (f"    # {to}" if to in self.also else ""))
        return Pending(f"{method} {target}", lambda: send(port, method, target, fields, body))

    def finish_curl(self, pending: Pending, show: tuple[str, ...] = (), *,
                    is_new: bool = False) -> Answer:
        """Wait for the answer of a request that was begun, and print it."""
        answer = pending.wait()
        if not is_new:
            self.print(f"(now the answer to {pending.request})")
        self.print(drawing.draw_answer(answer, show) + "\n")
        if answer.id and not self._is_chosen:
            self.watch = f"#request={answer.id}"
        return answer

    def curl_at_once(self, count: int, target: str, *, to: str = "gateway",
                     headers: dict[str, str] | None = None) -> list[Answer]:
        """Send GETs at the same time; print the status and the time of each, as they come."""
        port = self.port(to)
        command = drawing.draw_curl(f"localhost:{port}{target}", "GET", headers or {}, None)
        shown = command.replace("curl -i", "curl -so /dev/null -w '%{http_code} %{time_total}\\n'")
        self.print(f"$ for n in $(seq {count}); do {shown} & done; wait")
        pending = [Pending(f"GET {target}", lambda: send(port, "GET", target, headers))
                   for _ in range(count)]
        answers = sorted((each.wait() for each in pending), key=lambda answer: answer.seconds)
        for answer in answers:
            self.print(f"{answer.status} {answer.seconds:.3f}")
        self.print()
        return answers


class Tour(Stage):
    """What a chapter is given: the verbs of Stage, and those that show what the shop knows."""

    def show_log(self, request_id: str, *processes: str) -> list[str]:
        """Print the log lines with a request id, as soon as each of the processes has one."""
        def find() -> list[str]:
            return [line for line in list(self.shop.lines) if request_id in line]

        def is_there(lines: list[str]) -> bool:
            labels = {line.partition("|")[0].strip() for line in lines}
            return bool(lines) and labels.issuperset(processes)

        lines = poll(f"log lines with {request_id} of {', '.join(processes)}", find, is_there)
        if request_id in self.watch:  # it is the last request
            self.choose_watch(self.watch)
        self.print(f"(the log of all processes: the lines with \"{request_id}\")")
        self.print(drawing.draw_lines("\n".join(lines)) + "\n")
        return lines

    def show_lines(self, process: str, since: int = 0) -> None:
        """Print the lines of a process in the log, without the first `since` of the whole log."""
        lines = [line for line in self.shop.lines[since:] if line.startswith(f"{process} ")]
        self.print(f"(the log of {process})")
        self.print(drawing.draw_lines("\n".join(lines)) + "\n")

    def spans(self, request_id: str, services: Sequence[str] = ()) -> list[dict]:
        """Return the spans of a request, as soon as each of the services has recorded one."""
        def find() -> list[dict]:
            return [span for name in ("gateway", *SERVICES)
                    for span in send(self.port(name), "GET", "/traces").json
                    if span["tags"].get("request.id") == request_id]

        def are_there(spans: list[dict]) -> bool:
            answered = {span["localEndpoint"]["serviceName"] for span in spans
                        if span.get("kind") == "SERVER"}
            return bool(spans) and answered.issuperset(services)

        return poll(f"spans of request {request_id} in {', '.join(services)}", find, are_there)

    def show_trace(self, request_id: str, *services: str) -> list[dict]:
        """Print a request's trace, as soon as the gateway and these services have recorded it."""
        spans = self.spans(request_id, ("gateway", *services))
        self.print(f"(the trace of request {request_id}, from GET /traces of each process:")
        self.print(" process, what it did, status, and when; a call as its caller sees it)")
        self.print(drawing.draw_trace(spans) + "\n")
        self.choose_watch(f"#trace={spans[0]['traceId']}")
        return spans

    def metrics(self, of: str = "gateway") -> Metrics:
        """Return the metrics of a process."""
        return parse_metrics(send(self.port(of), "GET", "/metrics").body)

    def in_flight(self, service: str, of: str = "gateway") -> int:
        """Return how many calls of a process to a service have not ended yet."""
        return int(self.metrics(of).total("microshop_bulkhead_in_use", upstream=service))

    def show_order(self, order_id: int, *columns: str) -> dict:
        """Print these columns of an order's row, as it is on disk now; return all of it."""
        [row] = self.find("orders", "orders", id=order_id)
        self.print(f"(from the row of order {order_id} in orders.db)")
        self.print(drawing.draw_row({column: row[column] for column in columns}) + "\n")
        self.choose_watch(f"#order={order_id}")
        return row

    def find(self, service: str, table: str, **wanted: Any) -> list[dict]:
        """Return the rows of a table whose columns have these values, like id=203.

        The database is opened only to read it.
        """
        path = Path(self.shop.folder(), f"{service}.db")
        conditions = " AND ".join(f"{column} = ?" for column in wanted)
        query = f"SELECT * FROM {table} WHERE {conditions}"
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(query, list(wanted.values()))]

    def show_audit(self) -> bool:
        """Run the audit on the shop's databases, print what it says; return whether they agree."""
        arguments = ["-m", "microshop.audit", "--data", self.shop.folder()]
        self.print(f"$ python {shlex.join(arguments)}")
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        self.print(drawing.draw_lines(done.stdout + done.stderr) + "\n")
        return done.returncode == 0


def send(port: int, method: str, target: str, headers: dict[str, str] | None = None,
         body: str | None = None) -> Answer:
    """Send a request on a connection of its own, as curl does. Status 0: there was no answer."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        try:
            connection.request(method, target, body, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            problem = CURL_ERRORS.get(type(error), f"no answer: {error!r}")
            return Answer(0, "", {}, problem, time.monotonic() - began)
        received = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, response.reason, received, text, time.monotonic() - began)
