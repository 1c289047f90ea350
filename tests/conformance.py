"""Judges from outside: the tools of others read what the shop publishes about itself.

    python -m tests.conformance [--if-possible]

    /metrics        prometheus_client, and promtool if Debian's package `prometheus` is installed
    /openapi.json   openapi-spec-validator; schemathesis, which sends what the document allows and
                    what it forbids, to a shop without a token and to one with a token
    /traces, Server-Timing    the parsers of tests/formats.py
    microshop.kubernetes      kubernetes-validate, for the oldest Kubernetes that the README names
                              and for the newest; kubectl, without a cluster
    the README's unit         systemd-analyze; and a shop is started with its command
    the README's nginx.conf   nginx, in front of that shop

The packages go into a temporary environment. Each check prints a line; the exit status is 1 if one
has failed, or if the packages cannot be had. With --if-possible, it is 0 in the second case.
"""
import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from microshop.chassis import wire
from tests.formats import parse_metrics, parse_server_timing, parse_spans
from tests.front import block, find_tool, nginx, replaced, shop_of_unit
from tests.helpers import (
    ask, ask_json, exchange, read_request, together, upstream, wait_until)
from tests.manifest import ALL_FLAGS, Manifest
from tests.observing import JSON_TYPE, METRICS_TYPE, OK, RealShop, real_shop
from tests.peers import Absent, prepare
from tests.report import WIDTH, Failed, Report, expect, run_tool

# A newer schemathesis may have more checks: try it, then change the version.
PACKAGES = ("prometheus_client", "openapi-spec-validator", "schemathesis==4.32.5",
            "kubernetes-validate")
TOOLS = {  # that are used if they are installed, and where they come from
    "promtool": "Debian: apt-get install prometheus",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "systemd-analyze": "Debian: apt-get install systemd",
    "nginx": "Debian: apt-get install nginx-light",
}
TOKEN = "s3cret"
SEED, EXAMPLES = 13, 40   # of schemathesis: its random seed, and the cases for each operation
BEARER = {"Authorization": f"Bearer {TOKEN}"}
RATE = "10000r/s"         # for nginx, where it is to refuse nothing
ORDER = {"userId": 1, "productId": 101}

# What the real parser of Prometheus finds, as JSON.
READ_METRICS = """if True:
    import json, sys
    from prometheus_client.parser import text_fd_to_metric_families
    families = text_fd_to_metric_families(sys.stdin)
    json.dump([f"{sample.name} {sorted(sample.labels.items())} {float(sample.value)}"
               for family in families for sample in family.samples], sys.stdout)
"""

# What Kubernetes' own schemas say; strict: they refuse unknown fields, too. Exit status 1 if it is
# an error, or if there is no schema for a kind.
OLDEST = "1.26"
VALIDATE = """if True:
    import json, sys
    from kubernetes_validate import utils
    items, errors = json.load(sys.stdin)["items"], []
    for version in (sys.argv[1], utils.latest_version()):
        for item in items:
            try:
                found = utils.validate(item, version, strict=True)
                assert found == utils.major_minor(version), f"these are the schemas of {found}"
            except Exception as error:
                path = ".".join(map(str, getattr(error, "path", [])))
                errors.append(f"{item['kind']} {item['metadata']['name']}, {version}: {path}: "
                              f"{getattr(error, 'message', error)}")
    print("\\n".join(errors) or f"{len(items)} items, Kubernetes {sys.argv[1]} and {version}")
    sys.exit(bool(errors))
"""
MANIFESTS = ((), ALL_FLAGS)


class Difference(NamedTuple):
    """A setting of schemathesis that makes it accept what the shop does on purpose."""

    setting: str
    value: list[str]
    operation: str  # like "POST /orders"; empty: all operations
    reason: str


# The only place for differences that are known and intended. The values replace the defaults of
# schemathesis; what they add to these, or leave out, is in the reason.
REJECTING = ["400", "401", "403", "404", "405", "406", "409", "415", "422", "428", "429", "5xx"]
ACCEPTING = ["2xx", "3xx", "401", "403", "404", "409", "429", "5xx"]
DIFFERENCES = [
    Difference(
        "checks.negative_data_rejection.expected-statuses", [*REJECTING, "414"], "",
        "414 is a rejection, too, of values that make the request line too long"),
    Difference(
        "checks.positive_data_acceptance.expected-statuses", [*ACCEPTING, "412"], "",
        "412 is what a valid If-Match is for: it hardly ever names the item's present state"),
    Difference(
        "checks.positive_data_acceptance.expected-statuses", [*ACCEPTING, "422"], "POST /orders",
        "422 is right for an order of a user or product that does not exist; a schema cannot know"),
]


# --- the judges

@contextlib.contextmanager
def environment() -> Iterator[Path]:
    """Install the packages into a temporary folder; yield it. Raises Absent."""
    with tempfile.TemporaryDirectory(prefix="microshop-conformance-") as folder:
        prepare("python -m venv", [sys.executable, "-m", "venv", folder])
        prepare(f"pip install {' '.join(PACKAGES)}", [
            f"{folder}/bin/pip", "install", "-q", "--disable-pip-version-check",
            "--retries", "1", "--timeout", "10", *PACKAGES])
        yield Path(folder)


def judge_metrics(tools: Path, port: int) -> str:
    """Let the parsers of Prometheus read the metrics of a process; they must find the same."""
    answer = ask(port, target="/metrics")
    expect(answer, 200)
    if answer.headers.get("content-type") != METRICS_TYPE:
        raise Failed(f"Content-Type is {answer.headers.get('content-type')}, not {METRICS_TYPE}")
    metrics = parse_metrics(answer.body)
    found = json.loads(run_tool([f"{tools}/bin/python", "-c", READ_METRICS], answer.body))
    ours = [f"{name} {list(labels)} {value}" for family in metrics.values()
            for (name, labels), value in family.samples.items()]
    if different := sorted({*found} ^ {*ours}):
        raise Failed("\n".join(["prometheus_client and tests/formats.py differ:", *different]))
    if promtool := shutil.which("promtool"):
        if said := run_tool([promtool, "check", "metrics"], answer.body):
            raise Failed(said)
    return f"{len(metrics)} families, {len(ours)} samples"


def judge_openapi(tools: Path, port: int) -> str:
    answer = ask(port, target="/openapi.json")
    expect(answer, 200)
    document = answer.json
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(answer.body)
        file.flush()
        run_tool([f"{tools}/bin/python", "-m", "openapi_spec_validator", "--errors", "all",
                  file.name])
    return f"OpenAPI {document['openapi']}, {len(document['paths'])} paths"


def judge_traces(port: int) -> str:
    answer = ask(port, target="/traces")
    expect(answer, 200)
    return f"{len(parse_spans(answer.body))} spans"


def judge_behaviour(tools: Path, port: int, token: str = "") -> str:
    """Let schemathesis send requests that the document allows, and others; all checks are on."""
    with tempfile.TemporaryDirectory(prefix="microshop-conformance-") as folder:
        Path(folder, "schemathesis.toml").write_text(settings())
        header = ["--header", f"Authorization: Bearer {token}"] if token else []
        output = run_tool([
            f"{tools}/bin/schemathesis", "run", f"http://127.0.0.1:{port}/openapi.json",
            "--checks", "all", "--seed", str(SEED), "--max-examples", str(EXAMPLES),
            "--generation-database", "none", "--no-color", *header], folder=folder)
    counts = re.search(r"(\d+) generated, (\d+) passed", output)
    return f"{counts[1]} requests" if counts else ""


def settings() -> str:
    """Return the settings of schemathesis: the known differences, as TOML."""
    lines = []
    for one in sorted(DIFFERENCES, key=lambda one: one.operation):
        if one.operation:
            lines += ["[[operations]]", f"include-name = {json.dumps(one.operation)}"]
        lines += [f"# {one.reason}", f"{one.setting} = {json.dumps(one.value)}"]
    return "\n".join([*lines, ""])


def judge_manifest(tools: Path, flags: Sequence[str]) -> str:
    """Let kubernetes-validate read each item of the manifest."""
    return run_tool([f"{tools}/bin/python", "-c", VALIDATE, OLDEST],
                    json.dumps(Manifest(*flags).content).encode()).strip()


def judge_manifest_with_kubectl(flags: Sequence[str]) -> str:
    """Let kubectl decode each item into the types of Kubernetes. It needs no cluster for that."""
    said = run_tool(["kubectl", "version", "--client", "-o=json"])
    version = json.loads(said)["clientVersion"]["gitVersion"]  # like v1.32.4
    if int(version.split(".")[1]) < int(OLDEST.split(".")[1]):
        return f"not checked: kubectl {version} is older than {OLDEST}"
    errors = [error for item in Manifest(*flags).items for error in errors_of_kubectl(item)]
    if errors:
        raise Failed("\n".join(errors))
    return version


def errors_of_kubectl(item: dict[str, Any]) -> list[str]:
    """Return what kubectl finds wrong with an item of the manifest.

    `kubectl set --local` fails for wrong types and unknown kinds. Of items with pods, and of
    Services, it prints what it has decoded: a field that it does not know is missing there.
    """
    what, change = f"{item['kind']} {item['metadata']['name']}", ["env", "X=y"]
    if item["kind"] == "Service":
        selector = item["spec"]["selector"].items()
        change = ["selector", ",".join(f"{name}={value}" for name, value in selector)]
    try:
        decoded = run_tool(["kubectl", "set", change[0], "--local", "-f=-", "-o=json", change[1]],
                           json.dumps(item).encode())
    except Failed as failure:
        is_decoded = "does not have a pod template" in str(failure)
        return [] if is_decoded else [f"{what}: {failure}"]
    return [f"{what}: kubectl knows no {path}" for path in lost(item, json.loads(decoded))]


def lost(sent: Any, returned: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of what was sent and is not in what was returned, which may have more."""
    if isinstance(sent, dict) and isinstance(returned, dict):
        for key, value in sent.items():
            yield from lost(value, returned.get(key), f"{path}.{key}")
    elif isinstance(sent, list) and isinstance(returned, list) and len(sent) <= len(returned):
        for number, value in enumerate(sent):
            yield from lost(value, returned[number], f"{path}[{number}]")
    elif sent != returned:
        yield path


def judge_unit() -> None:
    """Let systemd-analyze read the unit; it must have nothing to say."""
    with tempfile.TemporaryDirectory(prefix="microshop-conformance-") as folder:
        unit = Path(folder, "microshop.service")
        unit.write_text(replaced(block("ini"), {"/usr/bin/python3": sys.executable}))
        if said := run_tool(["systemd-analyze", "verify", "--recursive-errors=no", str(unit)]):
            raise Failed(said)


def judge_front_connections() -> None:
    """Count the connections that nginx opens to a gateway: it must keep one open, and use it."""
    connections = []

    def answer(connection: socket.socket) -> None:
        connections.append(connection)
        while request := read_request(connection):
            connection.sendall(OK)
            if b" HTTP/1.1\r\n" not in request or b"Connection: close" in request:
                return

    with upstream(answer) as url, nginx(int(url.rpartition(":")[2]), RATE) as port:
        for _ in range(5):
            expect(ask(port), 200)
    if len(connections) != 1:
        raise Failed(f"nginx opened {len(connections)} connections for 5 requests, not one")


def judge_front() -> str:
    """Send requests to a shop, which runs as the unit says, through nginx."""
    with shop_of_unit(TOKEN) as shop:
        judge_passing(shop.gateway)
        with nginx(shop.gateway, "1r/m") as port:
            expect(ask(port, target="/users"), 200)
            wait_until(lambda: ask(port, target="/users").status == 429, "requests to get 429")
        return judge_rolling_restart(shop)


def judge_passing(gateway: int) -> None:
    """Send requests that show what nginx passes on."""
    with nginx(gateway, RATE) as port:
        direct, passed = (ask(at, target="/users") for at in (gateway, port))
        expect(passed, 200)
        if passed.body != direct.body:
            raise Failed(f"GET /users: {passed.body!r}, and without nginx {direct.body!r}")
        for origin, status in (("https://shop.example.com", 201), ("https://evil.example", 403)):
            expect(ask_json(port, "POST", "/orders", ORDER, **BEARER,
                            Host="shop.example.com", Origin=origin), status)
        expect(ask(gateway, target="/metrics"), 200)
        expect(ask(port, target="/metrics", headers={"Host": "localhost"}), 403)
        largest = b" " * wire.MAX_BODY
        expect(ask(port, "POST", "/users", {**JSON_TYPE, **BEARER}, largest), 400)


def judge_rolling_restart(shop: RealShop) -> str:
    """Send reads and writes through nginx while SIGHUP replaces every process: none may fail."""
    failures, counts, is_over = [], Counter(), threading.Event()

    def send(method: str, status: int, *rest: Any) -> None:
        while not is_over.is_set():
            answer = ask(port, method, "/users", *rest)
            counts[method] += 1
            if answer.status != status:
                failures.append(f"{method} /users: {answer.status} {answer.body[:WIDTH]!r}")

    def restart() -> None:
        try:
            wait_until(lambda: len(counts) == 2, "the first answers")
            shop.run_all.popen.send_signal(signal.SIGHUP)
            shop.run_all.wait_for("every process has been replaced")
        finally:
            is_over.set()

    with nginx(shop.gateway, RATE) as port:
        write = partial(send, "POST", 201, {**JSON_TYPE, **BEARER}, b'{"name":"Carol"}')
        read = partial(send, "GET", 200)
        outcomes = together(restart, read, read, write, write)
    failures += [repr(outcome) for outcome in outcomes if outcome is not None]
    if failures:
        raise Failed("\n".join([f"{len(failures)} failures, like these:", *failures[:5]]))
    return f"{counts['GET']} reads, {counts['POST']} writes"


# --- what happens before they judge

def make_traffic(shop: RealShop) -> None:
    """Let something happen of every kind that metrics and traces tell. Raises Failed."""
    expect(shop.ask("POST", "/orders", ORDER), 201)
    expect(shop.ask("POST", "/orders", {**ORDER, "quantity": 100_000}), 409)
    expect(shop.ask("POST", "/orders", {**ORDER, "userId": 999}), 422)
    expect(shop.ask("POST", "/orders/203/cancel"), 200)
    expect(shop.ask("GET", "/orders?expand=user,product"), 200)
    expect(shop.ask("GET", '/users/"><img/src=x/onerror=alert(1)>'), 404)
    os.kill(shop.pid("users"), signal.SIGKILL)
    wait_until(lambda: shop.ask("GET", "/users/1").status == 200, "users to be back")
    os.kill(shop.pid("products"), signal.SIGSTOP)
    try:
        placed = shop.ask("POST", "/orders", ORDER)
    finally:
        os.kill(shop.pid("products"), signal.SIGCONT)
    expect(placed, 202)
    place = placed.headers["location"]
    wait_until(lambda: shop.ask("GET", place).json["status"] == "confirmed",
               f"{place} to be confirmed")


def judge_timing(port: int) -> str:
    """Read Server-Timing on answers of every kind."""
    tag = ask(port, target="/users/1").headers["etag"]
    made = ask(port, "POST", "/users", JSON_TYPE, b'{"name":"Carol"}').headers["location"]
    requests: list[tuple[int, tuple]] = [
        (200, ("GET", "/users")), (200, ("HEAD", "/users")), (200, ("GET", "/")),
        (304, ("GET", "/users/1", {"If-None-Match": tag})), (204, ("DELETE", made)),
        (204, ("OPTIONS", "/users")), (404, ("GET", made)), (404, ("GET", "/nowhere")),
        (405, ("PATCH", "/users/1")), (400, ("GET", "/users?limit=many")),
        (422, ("POST", "/users", JSON_TYPE, b"{}")), (200, ("GET", "/health"))]
    answers = [(status, request, ask(port, *request)) for status, request in requests]
    [garbage] = exchange(port, b"GET /users\r\n\r\n")
    for status, request, answer in [*answers, (400, ("a request without a version",), garbage)]:
        what = " ".join(map(str, request))
        if answer.status != status or "server-timing" not in answer.headers:
            raise Failed(f"{what}: status {answer.status}, expected {status} with Server-Timing; "
                         f"headers {answer.headers}")
        entries = parse_server_timing(answer.headers["server-timing"])
        if entries[-1].name != "gateway" or None in [entry.duration for entry in entries]:
            raise Failed(f"{what}: the last entry must be the gateway's, and each must have a "
                         f"duration: {answer.headers['server-timing']}")
    return f"{len(answers) + 1} answers"


def judge(tools: Path) -> int:
    """Print a line for each check; return how many failed."""
    report = Report()
    with real_shop() as shop:
        gateway = shop.gateway
        report.check("traffic: orders, errors, a killed and a stopped service", make_traffic, shop)
        report.check("Server-Timing of the gateway", judge_timing, gateway)
        for name, port in shop.ports.items():
            report.check(f"/openapi.json of {name}, openapi-spec-validator",
                         judge_openapi, tools, port)
        report.check("the gateway does what its document says, schemathesis",
                     judge_behaviour, tools, gateway)
        for name, port in shop.ports.items():
            report.check(f"/metrics of {name}, the parsers of Prometheus",
                         judge_metrics, tools, port)
            report.check(f"/traces of {name}, as Zipkin v2", judge_traces, port)
    with real_shop(MICROSHOP_TOKEN=TOKEN) as shop:
        report.check("a gateway with a token does what its document says, schemathesis",
                     judge_behaviour, tools, shop.gateway, TOKEN)
    judge_deployment(report, tools)
    return report.failures


def judge_deployment(report: Report, tools: Path) -> None:
    """Judge what the shop says of clusters and servers, as far as the tools are installed."""
    for flags in MANIFESTS:
        what = " ".join(["microshop.kubernetes", *flags])
        report.check(f"{what}, kubernetes-validate", judge_manifest, tools, flags)
        if find_tool("kubectl"):
            report.check(f"{what}, kubectl", judge_manifest_with_kubectl, flags)
    if find_tool("systemd-analyze"):
        report.check("the README's unit, systemd-analyze", judge_unit)
    if find_tool("nginx"):
        report.check("the README's nginx keeps connections", judge_front_connections)
        report.check("the README's nginx in front of the unit's shop, a rolling restart",
                     judge_front)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("--if-possible", action="store_true",
                        help="exit with status 0 if the packages cannot be had")
    if_possible = parser.parse_args(arguments).if_possible
    try:
        with environment() as tools:
            for tool, source in TOOLS.items():
                if not find_tool(tool):
                    print(f"{tool} is not installed ({source})")
            sys.exit(1 if judge(tools) else 0)
    except Absent as absent:
        print(f"conformance is not checked: {absent}")
        sys.exit(0 if if_possible else 1)


if __name__ == "__main__":
    main()
