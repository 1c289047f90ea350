"""A group of processes that call each other, drawn from what a Watch has heard of them.

The result is for JSON: the nodes, an edge for each direction of calls, and what guards these calls.

Law: what the nodes serve is not known here.
"""
from collections.abc import Mapping

from microshop.chassis.handler import HEALTH_PATHS
from microshop.chassis.telemetry import REJECTIONS
from microshop.watching.exposition import quantile
from microshop.watching.watch import Node, Process

BREAKER_STATES = ("open", "half-open", "closed")  # several processes may differ: the worst counts


def draw_topology(nodes: list[Node], at: float) -> dict:
    """Draw the nodes. Clients call the first one; `at` is in seconds since 1970."""
    calls = [(node, name) for node in nodes for name in upstreams_of(node, nodes)]
    return {"nodes": [draw_node(node, at) for node in nodes],
            "edges": [draw_entry(nodes[0]), *[draw_calls(*call) for call in calls]],
            "upstreams": [draw_guards(*call) for call in calls]}


def upstreams_of(node: Node, nodes: list[Node]) -> list[str]:
    """Return the names of the nodes that a node calls."""
    called = {labels["upstream"] for labels, _ in node.metrics.select("microshop_calls_total")}
    return [other.name for other in nodes if other.name in called]


def draw_node(node: Node, at: float) -> dict:
    drawn = {"name": node.name, "url": node.urls[0], "state": node.state,
             "processes": [draw_process(process, at) for process in node.processes.values()]}
    return {**drawn, "silent": node.silence} if node.silence else drawn


def draw_process(process: Process, at: float) -> dict:
    return {"pid": process.pid, "uptime": max(at - process.started, 0.0),
            "restarts": process.restarts,
            "memory": int(process.metrics.total("process_resident_memory_bytes")),
            "cpu": process.rates.total("process_cpu_seconds_total")}


# --- edges: requests per second, the share that fails, and how long they take

def draw_entry(node: Node) -> dict:
    """Draw what clients ask a node for, health checks excepted."""
    return draw_edge(node, "client", node.name, "http_server_request_duration_seconds")


def draw_calls(node: Node, name: str) -> dict:
    """Draw the calls of a node to another. A call may take several tries."""
    edge = draw_edge(node, node.name, name, "http_client_request_duration_seconds",
                     peer_service=name)
    return {**edge, "asked": node.rates.total("microshop_calls_total", upstream=name)}


def draw_edge(node: Node, source: str, target: str, metric: str, **labels: str) -> dict:
    count, seconds, buckets = [
        [sample for sample in node.rates.select(f"{metric}_{part}", **labels)
         if sample.labels.get("http_route") not in HEALTH_PATHS]
        for part in ("count", "sum", "bucket")]
    tried = sum(sample.value for sample in count)
    mean = sum(sample.value for sample in seconds) / tried if tried else 0.0
    failed = sum(sample.value for sample in count if is_failure(sample.labels))
    return {"from": source, "to": target, "asked": tried, "tried": tried,
            "errors": failed / tried if tried else 0.0,
            "p50": quantile(0.5, buckets, mean), "p99": quantile(0.99, buckets, mean)}


def is_failure(labels: Mapping[str, str]) -> bool:
    """Return whether a request got no response, or a 5xx. A 4xx answers what was asked."""
    return labels.get("http_response_status_code", "")[:1] in ("", "5")


# --- what guards the calls: bulkhead, retry budget and circuit breakers

def draw_guards(node: Node, name: str) -> dict:
    def total(metric: str) -> int:
        return int(node.metrics.total(f"microshop_{metric}", upstream=name))

    states = node.metrics.select("microshop_breaker_state", upstream=name)
    servers = sorted({labels["server"] for labels, _ in states})
    return {"from": node.name, "to": name,
            "in_flight": total("bulkhead_in_use"), "limit": total("bulkhead_limit"),
            "retries": total("retry_budget_used"), "retry_limit": total("retry_budget_limit"),
            "rejected": {reason: node.rates.total("microshop_rejected_calls_total", upstream=name,
                                                  reason=reason) for reason in REJECTIONS},
            "instances": [draw_instance(node, upstream=name, server=server)
                          for server in servers]}


def draw_instance(node: Node, **labels: str) -> dict:
    states = [state for state in BREAKER_STATES
              if node.metrics.total("microshop_breaker_state", state=state, **labels)]
    seconds = [process.metrics.total("microshop_breaker_open_seconds", **labels)
               for process in node.processes.values()]
    return {"server": labels["server"], "state": [*states, "closed"][0], "seconds": max(seconds)}
