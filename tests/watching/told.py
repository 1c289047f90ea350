"""What processes tell of themselves at /metrics and /traces, written by hand for the tests."""
import json
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from microshop.watching import watch


def metrics(pid: int = 4711, *lines: str, started: float = 1000.0, restarts: int = 0,
            draining: int = 0, service: str = "gateway") -> str:
    """Return what a process answers at /metrics: what every process says, and more lines."""
    return "\n".join([
        "# HELP microshop_process_info Which process this is.",
        "# TYPE microshop_process_info gauge",
        f'microshop_process_info{{service="{service}",pid="{pid}"}} 1',
        f"microshop_process_restarts_total {restarts}",
        f"process_start_time_seconds {started}",
        f"microshop_draining {draining}", *lines, ""])


def histogram(name: str, labels: str, **counts: int) -> list[str]:
    """Return the lines of a histogram. Counts are given like le_0_5=3: 3 of at most 0.5 s."""
    lines = [f'{name}_bucket{{{labels},le="{bound.removeprefix("le_").replace("_", ".")}"}} {count}'
             for bound, count in counts.items()]
    total = max(counts.values())
    return [*lines, f'{name}_bucket{{{labels},le="+Inf"}} {total}',
            f"{name}_count{{{labels}}} {total}"]


def span(trace: int = 1, span: int = 1, parent: int = 0, at: float = 1000.0, **more: Any) -> dict:
    """Return a span as /traces answers it; `more` are further members of it."""
    told = {"traceId": f"{trace:032x}", "id": f"{span:016x}", "name": "get /users/{id}",
            "kind": "SERVER", "timestamp": int(at * 1e6), "duration": 1500,
            "localEndpoint": {"serviceName": "gateway"},
            "tags": {"request.id": "r1", "pid": "4711"}}
    if parent:
        told["parentId"] = f"{parent:016x}"
    return {**told, **more}


class Stage:
    """Stands for all processes: what is answered at each URL, instead of watching.watch.fetch.

    Each answer is a text, or an exception to raise. If there are several, they come in turn. It
    also stands for the Resolver: a host has the address that is its name, unless a test says other.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[str | Exception]] = {}
        self.asked: list[str] = []
        self.addresses: dict[str, list[str] | OSError] = {}  # by name of the host

    def answer(self, base_url: str, *metrics: str | Exception, spans: list[dict] | None = None,
               traces: str | Exception | None = None) -> None:
        self.answers[f"{base_url}/metrics"] = list(metrics)
        self.answers[f"{base_url}/traces"] = [
            json.dumps(spans or []) if traces is None else traces]

    def patch(self) -> AbstractContextManager:
        """Return a context in which it stands for what a Watch would ask."""
        return mock.patch.multiple(watch, fetch=self.fetch, Resolver=lambda: self)

    def find(self, host: str, timeout: float) -> list[str]:
        found = self.addresses.get(host, [host])
        if isinstance(found, OSError):
            raise found
        return found

    def fetch(self, url: str, deadline: float, token: str = "") -> bytes:
        self.asked.append(url)
        answers = self.answers[url]
        answers.append(answer := answers.pop(0))
        if isinstance(answer, Exception):
            raise answer
        return answer.encode("utf-8", "surrogatepass")
