"""Watching other processes: what each tells of itself at /metrics and /traces, asked in rounds.

A Node is the gateway or a service: it has a name, and runs at some URLs. If the host name in a URL
has several addresses (in Kubernetes, one for each pod of a headless Service), each is asked.
Several processes may share an address, and each time another one answers. But every answer says
from which process it is: we know a process by its pid and its start. Its last answers show how fast
its counters grow; the differences between two rounds show events.

Memory: of each process, the metrics of the last WINDOW seconds; usually, that is some 60 KiB for
each round. The size of an answer is limited by connections.MAX_REPLY.

Law: nothing here goes through a circuit breaker or a bulkhead. The processes are trusted to answer
as the chassis does; a process that does not is found in one place, in ask().
"""
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

from microshop.chassis.connections import get
from microshop.chassis.errors import ServiceError
from microshop.chassis.resolver import Resolver
from microshop.watching.exposition import Metrics, add_up, parse_metrics
from microshop.watching.trace_memory import Span, TraceMemory, parse_spans

ASK_TIME = 0.5           # seconds for the answers to one round; half of it for looking names up
WINDOW = 10.0            # seconds over which rates are measured, and for which metrics are kept
SILENT_TIME = 1.75       # seconds without an answer that are forgiven: under load, one may be late
MAX_ASKED = 8            # requests to one address in a round
MAX_THREADS = 64         # that wait for answers
MAX_EVENTS = 100         # that are remembered
STATE_EVENTS = {"down": ("died", "cannot be seen: "), "draining": ("draining", "is draining"),
                "up": ("up", "answers again")}
BREAKER_EVENTS = {"open": "opened", "half-open": "is half-open: a request probes the instance",
                  "closed": "closed"}


class Silent(Exception):
    """A process has not answered as it should; the text says in few words how."""


def fetch(url: str, deadline: float, token: str = "") -> bytes:
    """Return what a GET is answered with.

    Raises Silent, or a ServiceError if the answer is not valid HTTP or too large.
    """
    try:
        reply = get(url, deadline, token=token)
    except TimeoutError:
        raise Silent("no answer in time") from None
    except (OSError, EOFError):
        raise Silent("refused") from None
    if reply.status == 403:
        raise Silent("answered 403 (set --token-file or MICROSHOP_TOKEN to the shop's token)")
    if reply.status != 200:
        raise Silent(f"answered {reply.status}")
    return reply.body


def find_addresses(url: str, resolver: Resolver) -> list[str]:
    """Return a base URL for each address of the host in a base URL. Raises Silent."""
    parts = urlsplit(url)
    try:
        hosts = resolver.find(parts.hostname or "", ASK_TIME / 2)
    except OSError:
        raise Silent("unknown host name") from None
    hosts = [f"[{host}]" if ":" in host else host for host in hosts]
    return [f"http://{host}:{parts.port or 80}" for host in hosts]


def ask(url: str, deadline: float, token: str = "") -> tuple["Process", list[Span]]:
    """Return what a process at this base URL tells of itself, and its spans. Raises Silent.

    If several processes share the address, any of them may answer, and next time another one.
    """
    try:
        process = Process(url, parse_metrics(fetch(f"{url}/metrics", deadline, token).decode()))
        spans: list[Span] = []
        with contextlib.suppress(Silent):  # spans may be late: the metrics say that it is up
            spans = parse_spans(fetch(f"{url}/traces", deadline, token))
        return process, spans
    except (ServiceError, ValueError, TypeError, KeyError, AttributeError):
        raise Silent("unintelligible") from None


class Process:
    """What is known of one process."""

    def __init__(self, url: str, metrics: Metrics):
        """Raises ValueError or KeyError if the metrics do not say which process it is."""
        [info] = metrics.select("microshop_process_info")
        self.url = url
        self.pid = int(info.labels["pid"])
        self.started = metrics.total("process_start_time_seconds")  # a Unix time
        self.restarts = int(metrics.total("microshop_process_restarts_total"))
        self.metrics = metrics                   # its last answer
        self.heard_at = 0.0                      # the Unix time of that
        self.history: dict[float, Metrics] = {}  # its answers, by their times
        self.rates = Metrics()                   # how much each value grows per second
        self.grown = Metrics()                   # how much each grew between the last two rounds

    def note(self, metrics: Metrics, now: float) -> None:
        """Keep an answer; if there are two in a round, keep the later one."""
        self.metrics, self.heard_at = metrics, now
        self.history[now] = metrics

    def measure(self, now: float) -> None:
        """Find out how much each value has grown, as far as there is something to compare with."""
        self.history = {at: metrics for at, metrics in self.history.items()
                        if 0 <= now - at <= WINDOW}
        self.rates = self.grown = Metrics()
        times = sorted(self.history)
        if len(times) > 1:
            self.rates = self.metrics.growth_since(self.history[times[0]], now - times[0])
            if self.heard_at == now:
                self.grown = self.metrics.growth_since(self.history[times[-2]])


class Node:
    """What has a name, and runs at one or more base URLs. A `token` is sent to it, if given.

    `state` is "up", "draining", or "down" if nothing of it answers (`silence` says how); "" before
    the first round. `metrics`, `rates` and `grown` are the sums of those of all processes.
    """

    def __init__(self, name: str, urls: list[str], token: str = ""):
        self.name, self.urls, self.token = name, urls, token
        self.processes: dict[tuple[int, float], Process] = {}  # by pid and start
        self.state, self.silence = "", ""
        self.heard_at = 0.0  # the Unix time of the last round in which any of it answered
        self.metrics, self.rates, self.grown = Metrics(), Metrics(), Metrics()

    def urls_to_ask(self, urls: list[str]) -> Iterator[str]:
        """Yield each URL; several times if several processes share it, so that each is asked."""
        for url in urls:
            known = sum(process.url == url for process in self.processes.values())
            yield from [url] * (1 if known < 2 else min(known + 1, MAX_ASKED))

    def note(self, told: Process, now: float) -> None:
        """Record what a process answered.

        If it was started after the last round, it counted from zero since then.
        """
        process = self.processes.setdefault((told.pid, told.started), told)
        if process is told and told.started > self.heard_at:
            process.history[self.heard_at] = Metrics()
        process.note(told.metrics, now)

    def end_round(self, silence: str, now: float) -> None:
        """Find out the state and the sums. `silence` says how no process answered, "" if one did.

        A process that has not answered although others have is taken to have ended, if one of them
        was started since its last answer (in its place, it seems), or if that was long ago.
        """
        if not silence:
            self.heard_at = now
            newest = max(process.started for process in self.processes.values())
            horizon = max(newest, now - WINDOW)
            self.processes = {key: process for key, process in self.processes.items()
                              if process.heard_at == now or process.heard_at >= horizon}
        if not 0 < now - self.heard_at <= SILENT_TIME:
            self.silence = silence
        processes = self.processes.values()
        for process in processes:
            process.measure(now)
        self.metrics = add_up(process.metrics for process in processes)
        self.rates = add_up(process.rates for process in processes)
        self.grown = add_up(process.grown for process in processes)
        drains = [process.metrics.total("microshop_draining") for process in processes]
        self.state = "down" if self.silence else "draining" if all(drains) else "up"


def begin_to_ask(node: Node, look_ups: list[Future], pool: ThreadPoolExecutor,
                 deadline: float) -> Iterator[Future]:
    """Ask a node at every address that was found. Yield what the answers will be.

    A look-up that failed is an answer, too: it tells how nothing answers there.
    """
    for look_up in look_ups:
        if look_up.exception():
            yield look_up
        else:
            for url in node.urls_to_ask(look_up.result()):
                yield pool.submit(ask, url, deadline, node.token)


class Watch:
    """Asks all nodes, in rounds, and remembers what happened to them."""

    def __init__(self, nodes: list[Node]):
        self.nodes = nodes
        self.resolver = Resolver()
        self.memory = TraceMemory()
        self.events: list[dict] = []  # the newest first

    def tell(self, at: float, node: str, kind: str, text: str) -> None:
        """Add an event, which happened `at` this Unix time, unless it was told before."""
        event = {"at": at, "node": node, "kind": kind, "text": text}
        if event not in self.events:
            self.events = sorted([event, *self.events], key=lambda one: -one["at"])[:MAX_EVENTS]

    def ask_all(self, now: float) -> None:
        """Ask every process, in parallel, and record what it answers. `now` is a Unix time."""
        deadline = time.monotonic() + ASK_TIME
        with ThreadPoolExecutor(MAX_THREADS) as pool:
            look_ups = [[pool.submit(find_addresses, url, self.resolver) for url in node.urls]
                        for node in self.nodes]
            answers = [list(begin_to_ask(node, of_node, pool, deadline))
                       for node, of_node in zip(self.nodes, look_ups, strict=True)]
        for node, of_node in zip(self.nodes, answers, strict=True):
            before = node.state
            self._note(node, of_node, now)
            if before and node.state != before:
                kind, text = STATE_EVENTS[node.state]
                self.tell(now, node.name, kind, f"{node.name} {text}{node.silence}")
            self._tell_breakers(node, now)

    def _note(self, node: Node, answers: list[Future], now: float) -> None:
        silences = []
        for answer in answers:
            try:
                process, spans = answer.result()
            except Silent as silent:
                silences.append(str(silent))
                continue
            self.memory.note(spans)
            node.note(process, now)
            if process.restarts:
                self.tell(process.started, node.name, "restarted",
                          f"{node.name} was started again (pid {process.pid})")
        node.end_round(silences[0] if len(silences) == len(answers) else "", now)

    def _tell_breakers(self, node: Node, now: float) -> None:
        """Tell of each change of a circuit breaker; of that to its present state last."""
        changes = node.grown.select("microshop_breaker_changes_total")
        changes.sort(key=lambda change: node.metrics.total(
            "microshop_breaker_state", **change.labels))
        for labels, count in changes:
            times = f" ({count:.0f} times)" if count > 1 else ""
            self.tell(now, node.name, "breaker",
                      f"{node.name}: the circuit breaker for {labels['upstream']} "
                      f"at {labels['server']} {BREAKER_EVENTS[labels['state']]}{times}")
