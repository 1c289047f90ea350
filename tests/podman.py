"""Runs pod specs with podman, a container engine, so that no cluster is needed to try them.

podman 4.3 (Debian 12) takes Pods and ConfigMaps as Kubernetes does, but not what makes pods: so a
StatefulSet and a Deployment become Pods here. What is dropped or changed is below, with its reason;
all else is kept: image, command, environment, user, capabilities, read-only root, limits, volumes.
Not tried here: Services (a pod has the name of its Service instead), NetworkPolicies, and what the
kubelet does with probes (tests/cluster.py asks what they ask).

Everything happens in namespaces of its own, so the machine's own podman is never touched, and all
processes, files and networks vanish with them. See namespaces(7).
"""
import contextlib
import copy
import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers import TOP
from tests.hosts import mortal
from tests.manifest import WORKLOADS
from tests.peers import Absent, prepare
from tests.report import run_tool

Object = dict[str, Any]  # of the Kubernetes API

PACKAGES = "podman runc netavark aardvark-dns catatonit iptables iproute2"  # of Debian
TOOLS = ("podman", "runc", "catatonit", "iptables", "ip", "unshare", "setpriv", "ldd")
NETWORK = "shop"
CGROUPS = Path("/sys/fs/cgroup")
PORTS_APART = 100  # between the ports of two pods of one Deployment, on this machine


# --- from a manifest to pods

class Pod(NamedTuple):
    """A pod as podman takes it, and what the test must know of it."""

    name: str
    document: Object
    container: str     # the name that podman gives its only container
    port: int          # where this machine reaches it
    paths: set[str]    # what its probes ask for
    grace: int         # seconds that it has to end


def pods_of(manifest: Object) -> list[Pod]:
    """Return the pods that each StatefulSet and Deployment makes."""
    return [make_pod(item, number) for item in manifest["items"]
            if item["kind"] in WORKLOADS
            for number in range(item["spec"]["replicas"])]


def make_pod(workload: Object, number: int) -> Pod:
    """Return one of the pods of a StatefulSet or Deployment."""
    name = workload["metadata"]["name"]  # of its Service, too, which podman's DNS does not know
    if workload["kind"] == "Deployment":
        name += f"-{number}"
    spec = copy.deepcopy(workload["spec"]["template"]["spec"])
    [container] = spec["containers"]
    mounts = container["volumeMounts"]
    for template in workload["spec"].get("volumeClaimTemplates", []):
        volume = template["metadata"]["name"]
        claim = {"claimName": f"{volume}-{name}"}  # podman makes a volume of that name
        spec["volumes"].append({"name": volume, "persistentVolumeClaim": claim})
    for named in (*spec["volumes"], *mounts):  # pods with an emptyDir of one name would share it
        named["name"] += f"-of-{name}"
    for outer in mounts:  # the mount point of the inner volume is made in the outer one
        if any(inner["mountPath"].startswith(f"{outer['mountPath']}/") for inner in mounts):
            del outer["readOnly"]
    # podman would run curl in the container.
    probes = [container.pop(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")]
    [port] = container["ports"]
    port["hostPort"] = port["containerPort"] + PORTS_APART * number
    return Pod(name, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec},
               f"{name}-{container['name']}", port["hostPort"],
               {probe["httpGet"]["path"] for probe in probes},
               spec["terminationGracePeriodSeconds"])


def secret(name: str, key: str, value: str) -> Object:
    """Return a Secret. Its value must be valid base64, since podman does not decode it."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": {key: value}}


# --- the image

# Parts of the library that the shop does not need.
SKIPPED = re.compile("test|idlelib|tkinter|ensurepip|config-.*|(site|dist)-packages")


def make_image(name: str) -> str:
    """Make an image of the Python that runs this, and of nothing else; return its size.

    No registry is asked. Python is where it is in the stock image; what it loads is where it was.
    """
    library = Path(sysconfig.get_path("stdlib"))
    binary = os.path.realpath(sys.executable)
    paths = {"/usr/local/bin/python": binary}
    for path in library.iterdir():
        if not SKIPPED.fullmatch(path.name) and path.exists():  # a link may lead nowhere
            paths[f"/usr/local/lib/{library.name}/{path.name}"] = str(path)
    for loaded in shared_objects(binary, *library.glob("lib-dynload/*")):
        paths[loaded] = loaded
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
        for inside, outside in paths.items():
            tar.add(outside, inside, filter=readable)
    # Without PATH, kube play does not find `python`.
    run_tool(["podman", "import", "--change", "ENV PATH=/usr/local/bin", "-", name],
             file.getvalue())
    return f"{file.tell() / 1e6:.0f} MB"


def shared_objects(*binaries: str | Path) -> set[str]:
    """Return the paths of the libraries that programs and modules load."""
    found = set(re.findall(r"(/\S+) \(0x", run_tool(["ldd", *map(str, binaries)])))
    # The C library loads one by itself, when a thread ends.
    return found | {str(path) for folder in {Path(one).parent for one in found}
                    for path in folder.glob("libgcc_s.so.*")}


def readable(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Let every user read an entry of the image."""
    entry.mode |= 0o555
    return entry


# --- the engine

# What podman writes is in memory: its state in folders that are empty at first, and in /var all
# else. The first process of a PID namespace must wait for orphans; catatonit does nothing else.
SETUP = """
set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/changes /run/work
mount -t overlay -o lowerdir=/var,upperdir=/run/changes,workdir=/run/work overlay /var
mkdir -p /var/lib/containers
mount -t tmpfs tmpfs /var/lib/containers
ip link set lo up
exec catatonit -- "$@"
"""
# What it takes to run a command apart from everything else on this machine.
APART = ["unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc",
         "sh", "-c", SETUP, "sh"]
SETTINGS = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "/run/networks"
"""


def run_apart(command: list[str]) -> int:
    """Run a command in namespaces of its own; return its exit status. Raises Absent.

    When this process ends, however that is, so do all processes in there.
    """
    if os.geteuid() != 0:
        raise Absent("only root can run podman in namespaces of its own")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise Absent(f"{', '.join(missing)} not found (Debian: apt-get install {PACKAGES})")
    if not CGROUPS.is_dir():
        raise Absent(f"there is no {CGROUPS}")
    prepare("unshare", [*APART, "true"])
    with cgroups_removed():
        child = subprocess.Popen([*mortal(), *APART, *command], cwd=TOP,
                                 stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            return child.wait()
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()  # when its first process has ended, so have all others in the namespace
            raise


@contextlib.contextmanager
def cgroups_removed() -> Iterator[None]:
    """Remove the cgroups that podman makes meanwhile: they are in no namespace.

    Their names do not say whose they are, so one run waits for another. It also removes those of
    an earlier run that was killed.
    """
    lock = os.open(CGROUPS, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    remove_empty_cgroups()
    try:
        yield
    finally:
        remove_empty_cgroups()
        os.close(lock)


def remove_empty_cgroups() -> None:
    for path in sorted(CGROUPS.rglob("*/"), reverse=True):  # what is inside comes first
        if "libpod_parent" in path.parts:
            with contextlib.suppress(OSError):  # a process is in it
                path.rmdir()


def prepare_engine() -> None:
    """Let podman be ready to run containers, within run_apart(). Raises Absent."""
    files, processes = [resource.getrlimit(kind)[1]  # podman asks for more, where it may not
                        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)]
    path = Path("/run/containers.conf")
    path.write_text(SETTINGS.format(files=files, processes=processes))
    os.environ["CONTAINERS_CONF"] = str(path)
    prepare("podman network create", ["podman", "network", "create", NETWORK])
    prepare("podman run", ["podman", "run", "--rm", f"--network={NETWORK}", "--memory=64m",
                           "--rootfs", "/:O", "true"])


def podman(*arguments: str, documents: Sequence[Object] = ()) -> str:
    """Run a command of podman, with documents as its input; return its output. Raises Failed."""
    content = "\n---\n".join(map(json.dumps, documents))
    return run_tool(["podman", *arguments], content.encode())
