"""Watching other processes: what each tells of itself at /metrics and /traces, asked in rounds.

A Node is something that has a name and runs at some addresses. At each address, one process or
several may answer, each time another one; every answer names its process. So what is known of a
process is kept by its pid and its start: from its last answers follow the rates of what it counts,
and from the differences between two rounds follow events.

Memory: of each process, at most MAX_ROUNDS answers, which MAX_ANSWER and exposition.MAX_SAMPLES
limit; usually, that is some 30 KiB each.

Law: nothing here goes through a circuit breaker or a bulkhead, and no answer is trusted.
"""
import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from microshop.chassis.connections import Connection, Request
from microshop.chassis.errors import ServiceError
from microshop.chassis.exposition import Metrics, parse_metrics
from microshop.chassis.trace_memory import Span, TraceMemory

ASK_TIME = 0.5           # seconds for the answers to one round
WINDOW = 10.0            # seconds over which rates are measured, and for which metrics are kept
MAX_ROUNDS = 16          # answers of a process that are kept, at most
MAX_PROCESSES = 32       # that are known at one address
MAX_ASKED = 8            # requests to one address in a round
MAX_THREADS = 64         # that wait for answers
MAX_ANSWER = 4 * 2**20   # bytes
MAX_EVENTS = 100         # that are remembered
ROUNDS_MISSED = 2        # after which an address is silent: a process under load may miss one
UNINTELLIGIBLE = "unintelligible"
STATE_EVENTS = {"down": ("died", "does not answer: "), "draining": ("draining", "is draining"),
                "up": ("up", "answers again")}
BREAKER_EVENTS = {"open": "opened", "half-open": "is half-open: a request probes the instance",
                  "closed": "closed"}

Event = dict[str, Any]


class Silent(Exception):
    """A process has not answered as it should; the text says in few words how."""


def fetch(url: str, deadline: float) -> bytes:
    """Return what a GET is answered with, on a connection of its own. Raises Silent.

    If several processes share the port, any of them may answer, and next time another one.
    """
    request = Request(url, headers={"Connection": "close"})
    request.deadline = deadline
    try:
        connection = Connection(request.host, max(deadline - time.monotonic(), 0.001))
        with contextlib.closing(connection):
            connection.send_request(request)
            reply, _ = connection.read_reply("GET")
    except TimeoutError:
        raise Silent("no answer in time") from None
    except (OSError, EOFError):
        raise Silent("refused") from None
    except ServiceError:
        raise Silent(UNINTELLIGIBLE) from None
    if reply.status != 200:
        raise Silent(f"answered {reply.status}")
    if len(reply.body) > MAX_ANSWER:
        raise Silent(UNINTELLIGIBLE)
    return reply.body


class Process:
    """What is known of one process."""

    def __init__(self, metrics: Metrics):
        """Raises ValueError if the metrics do not say which process it is."""
        [info] = metrics.select("microshop_process_info")
        self.pid = int(info.labels.get("pid", ""))
        self.started = metrics.total("process_start_time_seconds")  # since 1970
        self.restarts = int(metrics.total("microshop_process_restarts_total"))
        self.answers: deque[tuple[float, Metrics]] = deque(maxlen=MAX_ROUNDS)  # and when they came
        self.rates = Metrics()

    @property
    def metrics(self) -> Metrics:
        """Its last answer."""
        return self.answers[-1][1]

    @property
    def heard_at(self) -> float:
        return self.answers[-1][0]

    def note(self, metrics: Metrics, now: float) -> Metrics:
        """Keep an answer, and return what has grown since the one before, if that is known."""
        before = self.metrics if self.answers and self.heard_at >= now - WINDOW else metrics
        if self.answers and self.heard_at == now:  # it was asked twice in this round
            self.answers.pop()
        self.answers.append((now, metrics))
        while self.answers[0][0] < now - WINDOW:
            self.answers.popleft()
        return metrics.increase_since(before)

    def measure(self, now: float) -> None:
        """Find out how much each value has grown per second, in the last WINDOW seconds."""
        recent = [answer for answer in self.answers if answer[0] >= now - WINDOW]
        self.rates = Metrics()  # empty if there is nothing to compare with
        if len(recent) > 1:
            [began, first], [_, last] = recent[0], recent[-1]
            self.rates.add(last.increase_since(first), 1 / (now - began))


class Address:
    """A base URL, and the processes that answer there."""

    def __init__(self, url: str):
        self.url = url
        self.processes: list[Process] = []
        self.silence = ""   # how it does not answer
        self._missed = 0    # rounds in a row without an answer

    def count_to_ask(self) -> int:
        """Return how many requests to send, so that each of several processes is likely asked."""
        known = len(self.processes)
        return 1 if known < 2 else min(known + 1, MAX_ASKED)

    def note(self, metrics: Metrics, now: float) -> tuple[Metrics, Process | None]:
        """Record an answer; return what has grown since the last one.

        Return also the process, if it was not known, and another one had its role before. If it was
        started after those known, it has taken the place of one of them: of that which was not
        heard for longest. Raises ValueError if the answer does not say what every process says.
        """
        told = Process(metrics)
        for process in self.processes:
            if (process.pid, process.started) == (told.pid, told.started):
                return process.note(metrics, now), None
        is_new = bool(told.restarts and self.processes) and all(
            told.started > process.started for process in self.processes)
        if self.silence:  # none of those known is there any more
            self.processes.clear()
        elif is_new:
            self.processes.remove(min(self.processes, key=lambda process: process.heard_at))
        self.processes = [*self.processes, told][-MAX_PROCESSES:]
        told.note(metrics, now)
        return (metrics.increase_since(Metrics() if is_new else metrics),
                told if told.restarts else None)

    def end_round(self, silence: str, now: float) -> None:
        """Record how a round went without an answer, or "" if there was one."""
        self._missed = self._missed + 1 if silence else 0
        if not silence or self._missed >= ROUNDS_MISSED or not self.processes:
            self.silence = silence
        if not silence:  # a process that did not answer for a while, although others did, has ended
            self.processes = [process for process in self.processes
                              if process.heard_at >= now - WINDOW]


class Node:
    """What has a name, and runs at one or more addresses.

    `state` is "up", "draining", or "down" if no address answers; "" before the first round.
    `metrics` and `rates` are the sums of those of all processes, `grown` is what they have counted
    since the last round.
    """

    def __init__(self, name: str, urls: list[str]):
        self.name = name
        self.addresses = [Address(url) for url in urls]
        self.state = ""
        self.metrics, self.rates, self.grown = Metrics(), Metrics(), Metrics()

    @property
    def processes(self) -> list[Process]:
        return [process for address in self.addresses for process in address.processes]

    @property
    def silence(self) -> str:
        """How it does not answer; "" if any of it answers."""
        silences = [address.silence for address in self.addresses]
        return silences[0] if all(silences) else ""

    def sum_up(self, now: float) -> None:
        """Find out the state and the sums, after a round."""
        self.metrics, self.rates = Metrics(), Metrics()
        for process in self.processes:
            process.measure(now)
            self.metrics.add(process.metrics)
            self.rates.add(process.rates)
        drains = [process.metrics.total("microshop_draining") for process in self.processes]
        self.state = "down" if self.silence else "draining" if drains and all(drains) else "up"


class Watch:
    """Asks all nodes, in rounds, and remembers what happened to them."""

    def __init__(self, nodes: list[Node], traces: TraceMemory):
        self.nodes, self.traces = nodes, traces
        self.events: list[Event] = []  # the newest first

    def tell(self, at: float, node: str, kind: str, text: str) -> None:
        """Add an event, which happened `at` seconds since 1970."""
        event = {"at": at, "node": node, "kind": kind, "text": text}
        if event not in self.events:
            self.events = sorted([event, *self.events], key=lambda one: -one["at"])[:MAX_EVENTS]

    def ask_all(self, now: float) -> list[Span]:
        """Ask every process, in parallel; return the spans that are new."""
        def ask(address: Address, path: str) -> list[Future]:
            return [pool.submit(fetch, address.url + path, now + ASK_TIME)
                    for _ in range(address.count_to_ask())]

        with ThreadPoolExecutor(MAX_THREADS) as pool:
            asked = {address: (ask(address, "/metrics"), ask(address, "/traces"))
                     for node in self.nodes for address in node.addresses}
        spans: list[Span] = []
        for node in self.nodes:
            before, node.grown = node.state, Metrics()
            for address in node.addresses:
                spans += self._note(node, address, *asked[address], now)
            node.sum_up(now)
            if before and node.state != before:
                kind, text = STATE_EVENTS[node.state]
                self.tell(time.time(), node.name, kind, f"{node.name} {text}{node.silence}")
            self._tell_breakers(node)
        return spans

    def _note(self, node: Node, address: Address, metrics: list[Future], traces: list[Future],
              now: float) -> list[Span]:
        """Record what an address of a node answered; return the new spans."""
        spans: list[Span] = []
        silences: list[str] = []
        for answer in metrics:
            with noting_silence(silences):
                grown, newcomer = address.note(parse_metrics(answer.result().decode()), now)
                node.grown.add(grown)
                if newcomer:
                    self.tell(newcomer.started, node.name, "restarted",
                              f"{node.name} was started again (pid {newcomer.pid})")
        is_silent = len(silences) == len(metrics)
        for answer in traces:
            with noting_silence(silences):
                spans += self.traces.note(json.loads(answer.result()))
        if UNINTELLIGIBLE in silences:
            address.end_round(UNINTELLIGIBLE, now)
        else:
            address.end_round(silences[0] if is_silent else "", now)
        return spans

    def _tell_breakers(self, node: Node) -> None:
        """Tell of each change of a circuit breaker; of that to its present state last."""
        changes = list(node.grown.select("microshop_breaker_changes_total"))
        changes.sort(key=lambda change: node.metrics.total(
            "microshop_breaker_state", **change.labels))
        for labels, count in changes[:MAX_EVENTS]:
            verb = BREAKER_EVENTS.get(labels.get("state", ""), "changed")
            times = f" ({count:.0f} times)" if count > 1 else ""
            self.tell(time.time(), node.name, "breaker",
                      f"{node.name}: the circuit breaker for {labels.get('upstream')} "
                      f"at {labels.get('server')} {verb}{times}")


@contextlib.contextmanager
def noting_silence(silences: list[str]) -> Iterator[None]:
    """Add to `silences` what is wrong with the answer that is used within, if anything is."""
    try:
        yield
    except Silent as silent:
        silences.append(str(silent))
    except (ValueError, RecursionError):
        silences.append(UNINTELLIGIBLE)
