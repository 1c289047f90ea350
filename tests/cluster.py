"""The shop as a cluster would run it: the pods of `python -m microshop.kubernetes`, under podman.

    python -m tests.cluster [--if-possible]

Each check prints a line, and builds on the ones before it. So the first one that fails is the last.
The exit status is then 1, and also if podman is missing or cannot run here; with --if-possible, it
is 0 if podman cannot run.

It needs root and the Debian packages that tests/podman.py names, but no network.
"""
import argparse
import os
import signal
import sys
from collections.abc import Sequence
from http.client import HTTPException

from tests.helpers import ask, ask_json, wait_until
from tests.manifest import Manifest
from tests.peers import Absent
from tests.podman import (
    NETWORK, Object, Pod, make_image, pods_of, podman, prepare_engine, run_apart, secret)
from tests.report import Failed, Report, expect

TOKEN = "s3cretly"  # valid base64: see secret()
ORDER = {"userId": 1, "productId": 101, "quantity": 3}
# Fails if there is no folder for temporary files; prints the user, and whether / is read-only.
TRY_RIGHTS = """if True:
    import os, sys, tempfile
    sys.tracebacklimit = 0
    tempfile.TemporaryFile()
    print("user", os.getuid(), "read-only" if os.statvfs("/").f_flag & os.ST_RDONLY else "writable")
"""
LOG_LINES = 10      # of a container, that are shown if it does not do what it should


class Cluster:
    """The shop, as pods; what the checks do with it, in this order."""

    def __init__(self, manifest: Object):
        self.pods = pods_of(manifest)
        self.documents = [
            secret("microshop-token", "token", TOKEN),
            *[item for item in manifest["items"] if item["kind"] == "ConfigMap"],
            *[pod.document for pod in self.pods]]
        self.gateway, self.other_gateway = [
            pod for pod in self.pods if pod.name.startswith("gateway")]
        self.place, self.order = "", {}  # where the order is, and what it is

    def make_image(self) -> str:
        [name] = {pod.document["spec"]["containers"][0]["image"] for pod in self.pods}
        return make_image(name)

    def start(self) -> str:
        podman("kube", "play", f"--network={NETWORK}", "-", documents=self.documents)
        for pod in self.pods:
            await_health(pod)
        return ", ".join(pod.name for pod in self.pods)

    def try_rights(self) -> str:
        for pod in self.pods:
            found = podman("exec", pod.container, "python", "-c", TRY_RIGHTS).strip()
            expected = f"user {pod.document['spec']['securityContext']['runAsUser']} read-only"
            if found != expected:
                raise Failed(f"{pod.name} runs as: {found}, expected: {expected}")
        return found

    def place_order(self) -> str:
        placed = ask_json(self.gateway.port, "POST", "/orders", ORDER,
                          Authorization=f"Bearer {TOKEN}")
        expect(placed, 201)
        self.place, self.order = placed.headers["location"], placed.json
        return f"{self.place} is {self.order['status']}"

    def refuse_without_token(self) -> None:
        expect(ask_json(self.gateway.port, "POST", "/orders", ORDER), 401)

    def find_order(self) -> None:
        """Look for the order, at the gateway that has not placed it."""
        answer = ask(self.other_gateway.port, target=self.place)
        expect(answer, 200)
        if answer.json != self.order:
            raise Failed(f"{self.place} is {answer.json}, expected {self.order}")

    def kill_orders(self) -> str:
        """Kill a process, as the kernel does when memory is short."""
        [pod] = [pod for pod in self.pods if pod.name == "orders"]
        killed = inspect(pod, "Pid")
        os.kill(int(killed), signal.SIGKILL)
        wait_until(lambda: inspect(pod, "Pid") not in ("0", killed),
                   f"{pod.container} to be started again")
        for pod in self.pods:
            await_health(pod)
        self.find_order()
        return f"pid {killed}, then {inspect(pod, 'Pid')}"

    def audit(self) -> str:
        return podman("exec", self.gateway.container,
                      *"python -m microshop.audit --remote".split()).strip()

    def stop(self) -> None:
        """Send SIGTERM to each process, and SIGKILL when its time to end is over."""
        for pod in self.pods:
            podman("stop", f"--time={pod.grace}", pod.container)
            if status := int(inspect(pod, "ExitCode")):
                raise Failed(f"{pod.container} ended with status {status}, not 0\n{log(pod)}")

    def start_again(self) -> None:
        podman("kube", "down", "-", documents=self.documents)
        if left := podman("ps", "--all", "--format={{.Names}}"):
            raise Failed(f"these containers are left after `podman kube down`:\n{left}")
        self.start()
        self.find_order()


def await_health(pod: Pod) -> None:
    """Wait until a pod answers what its probes ask, and says that all is well."""
    seen = ""

    def is_healthy() -> bool:
        nonlocal seen
        for path in sorted(pod.paths):
            try:
                answer = ask(pod.port, target=path)
            except (OSError, HTTPException) as error:
                seen = f"GET {path}: {error}"
                return False
            seen = f"GET {path}: status {answer.status}, {answer.body.decode()}"
            if answer.status != 200 or answer.json["status"] != "ok":
                return False
        return True

    try:
        wait_until(is_healthy, f"{pod.name} to be healthy")
    except AssertionError as failure:
        raise Failed(f"{failure}\n{seen}\n{log(pod)}") from None


def log(pod: Pod) -> str:
    return f"the log of {pod.name}:\n{podman('logs', f'--tail={LOG_LINES}', pod.container)}"


def inspect(pod: Pod, what: str) -> str:
    """Return a part of the state of its container, like its Pid, which is 0 if it does not run."""
    return podman("inspect", f"--format={{{{.State.{what}}}}}", pod.container).strip()


def judge() -> int:
    """Print a line for each check, until one has failed; return the exit status."""
    cluster, report = Cluster(Manifest().content), Report()
    checks = (
        ("an image of this Python", cluster.make_image),
        ("pods are healthy", cluster.start),
        ("each can write nothing but its data and temporary files", cluster.try_rights),
        ("an order is placed, with the token", cluster.place_order),
        ("an order without the token is refused", cluster.refuse_without_token),
        ("the other gateway finds the order", cluster.find_order),
        ("a killed process is back, and so is the order", cluster.kill_orders),
        ("the audit, run in the gateway's container", cluster.audit),
        ("SIGTERM ends each process with status 0", cluster.stop),
        ("after kube down and kube play, the order is still there", cluster.start_again))
    for what, check in checks:
        report.check(what, check)
        if report.failures:
            return 1
    print(f"all {len(checks)} checks passed")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster")
    parser.add_argument("--if-possible", action="store_true",
                        help="exit with status 0 if podman cannot be had or run")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends this as Ctrl-C does
    try:
        if settings.inside:
            prepare_engine()
            sys.exit(judge())
        flags = ["--if-possible"] if settings.if_possible else []
        sys.exit(run_apart([sys.executable, "-m", "tests.cluster", "--inside", *flags]))
    except Absent as absent:
        print(f"the cluster is not tried: {absent}")
        sys.exit(0 if settings.if_possible else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
