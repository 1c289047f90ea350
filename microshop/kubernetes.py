"""The same shop on Kubernetes: print a manifest, which needs no image but a stock one of Python.

    python -m microshop.kubernetes | kubectl apply --server-side --force-conflicts -f -

Kubernetes does for many machines what run_all does on one:

    run_all                                     Kubernetes
    starts each module as a process             a Pod for each
    restarts it, after a growing pause          the kubelet does, after a growing pause
    kills it when its heartbeat stops           liveness probe
    "ready": each process has said that         startup and readiness probes
      it listens
    keeps the listening socket open while       Service: a name and an address that stay; it leads
      processes come and go                       to the pods that are ready
    --workers: gateways share one port          replicas, behind one Service
    tells each process where the others are     DNS: each Service has a name
    SIGHUP: rolling restart                     rollout, whenever a pod template changes
    SIGTERM, a grace period, then SIGKILL       the same, after preStop
    the services listen on 127.0.0.1            NetworkPolicy
    labels in front of the lines of the log     kubectl logs

A manifest is a list of objects, which say what there should be. These kinds occur here:

    Pod            containers that run together on one machine; here, one container with one process
    Deployment     keeps a number of pods alike: of a process that owns no data, any pod will do
    StatefulSet    the same, but a pod keeps its name and its volume: for a service with a database
    ConfigMap      texts that pods see as files: here, the source
    Secret         a text that few may see: the token (it is not in the manifest)
    Service        a name, and an address that leads to the pods that are ready
    NetworkPolicy  which pods may call which
    PodDisruptionBudget      how many pods may be away when machines are emptied for maintenance
    HorizontalPodAutoscaler  adds and removes pods, by their load

On each machine (a node), the kubelet starts the containers of the pods that are meant to run there,
asks their probes, and stops them. A new pod template (what pods are made from) means a rollout: the
pods are replaced one after another.

What cannot be had in this way: a service that owns data has one pod, since SQLite has one writer.

Read from top to bottom: the processes, the source, the pods, the network, the workloads, the
command. Beside it, look at the output: python -m microshop.kubernetes --no-source | less. The API
is described at https://kubernetes.io/docs/reference/kubernetes-api/.

Law: it prints; it talks to no cluster. Names, ports and settings come from the processes' classes.
"""
import ast
import hashlib
import importlib
import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from microshop import SERVICES
from microshop.chassis import config, surroundings
from microshop.chassis.server import Service

Object = dict  # of the Kubernetes API

TOP = Path(__file__).parent.parent
HTTP_PORT, DNS_PORT = 80, 53
SOURCE, DATA, TOKEN = "/app", "/data", "/run/microshop"  # folders in a pod
USER = 10001    # of every process: any number but 0, which is root
PRESTOP = 5     # seconds until no node of the cluster sends clients to an ending gateway any more
LAST_STEP = 5   # seconds after the grace period: the saga's last call (orders.CALL_TIME), closing
PASSED_ON = [setting for setting in (*config.FOR_GATEWAY, *config.SHARED)
             if setting.name != "token-file"]  # to the processes in the pods
SCALE_AT = "700m"  # of a core (1000m, all that a gateway can use): above, another one is added


# --- the processes

Process = type[Service]  # our own class, of every process: not a Service of Kubernetes


def process_of(name: str) -> Process:
    """Return the class of the process with this name, like Users."""
    module = importlib.import_module(f"microshop.{name}")
    return next(value for value in vars(module).values()
                if isinstance(value, type) and issubclass(value, Service) and value.name == name)


def callees(process: Process) -> list[str]:
    """Return the names of the processes that this one calls: it has a setting for each URL."""
    return [setting.name.removesuffix("-url") for setting in process.options
            if setting.name.endswith("-url")]


def has_option(process: Process, name: str) -> bool:
    return name in [setting.name for setting in (*process.options, *config.SHARED)]


class Shop:
    """What is to run, and with which settings."""

    def __init__(self, settings: Namespace):
        self.settings = settings
        self.services = [process_of(name) for name in SERVICES]
        self.gateway, self.live = process_of("gateway"), process_of("live")
        self.processes = [*self.services, self.gateway, *([self.live] if settings.live else [])]

    def callers(self, process: Process) -> list[str]:
        return [other.name for other in self.processes if process.name in callees(other)]

    def url(self, caller: Process, name: str) -> str:
        """Return where a process finds another one: the name of a Service.

        live asks every gateway for what it has counted, so it needs the addresses of all pods.
        """
        is_every_pod_asked = caller is self.live and name == self.gateway.name
        return f"http://{name}{'-pods' if is_every_pod_asked else ''}:{process_of(name).port}"

    def variables(self, process: Process) -> dict[str, str]:
        """Return the environment of a process: it holds its settings, and how to run Python."""
        settings = {"host": "0.0.0.0", "port": str(process.port), "data": DATA,
                    "token-file": f"{TOKEN}/token",
                    **{f"{name}-url": self.url(process, name) for name in callees(process)}}
        for setting in PASSED_ON:
            text = getattr(self.settings, setting.name.replace("-", "_"))
            if text != setting.default:
                settings[setting.name] = text
        if self.settings.quiet:
            settings["quiet"] = "1"
        if process is self.live:  # it stays on 127.0.0.1, which kubectl port-forward reaches
            del settings["host"]
        own = {config.variable(name): text for name, text in settings.items()
               if name == "port" or has_option(process, name)}
        # The source is read-only, so Python cannot keep its compiled form there.
        return {**own, "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONUNBUFFERED": "1"}


# --- the source
#
# Immutable ConfigMaps hold it, so the stock image of Python will do. The name of each has a hash of
# its content: so new source means a new pod template, and that is a rollout. The old ConfigMap
# stays, so `kubectl rollout undo` brings the old source back. A pod gets the modules that its
# process imports, and no other: when one service changes, the others are not even restarted
# (independent deployment). Pods that need the same files of the chassis share one ConfigMap.

def modules_of(module: str) -> set[Path]:
    """Return the files of a module, and of all modules of microshop that it imports."""
    found: set[Path] = set()
    names_to_find = [module]
    while names_to_find:
        path = TOP.joinpath(*names_to_find.pop().split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in found or not path.exists():  # the last part was a name in a module
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names_to_find += [node.module, *[f"{node.module}.{alias.name}"
                                                 for alias in node.names]]
    return found


def files_of(shop: Shop, process: Process) -> set[Path]:
    """Return the files that a process needs."""
    files = modules_of(f"microshop.{process.name}")
    files |= set(TOP.glob(f"microshop/{process.name}.*"))  # live has a page
    if process is shop.gateway:  # so that there is a place in the cluster to run the audit
        files |= modules_of("microshop.audit")
    return files


def source_of(shop: Shop, process: Process) -> dict[str, Object]:
    """Return the ConfigMaps with the source of a process, by the folder whose files they hold.

    There is one for each folder, mounted one inside the other, and its keys are the files' names.
    """
    files = files_of(shop, process)
    source = {}
    for folder in sorted({path.parent for path in files}):
        name = process.name if folder == TOP / "microshop" else folder.name
        source[folder.relative_to(TOP).as_posix()] = config_map(
            name, {path for path in files if path.parent == folder})
    return source


def config_map(name: str, files: set[Path]) -> Object:
    """Return a ConfigMap of these files. Kubernetes takes at most 1 MiB."""
    texts = {path.name: path.read_text("utf-8") for path in sorted(files)}
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:10]
    return {"apiVersion": "v1", "kind": "ConfigMap", "immutable": True, "data": texts,
            "metadata": {"name": f"{name}-source-{digest}", "labels": labels(name)}}


# --- the pods

def labels(name: str) -> dict[str, str]:
    """Return what selects the pods of a process."""
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "microshop"}


def selector(name: str) -> Object:
    return {"matchLabels": labels(name)}


def pod_template(shop: Shop, process: Process, source: dict[str, Object]) -> Object:
    """Return the template of the pods in which a process runs."""
    settings, name = shop.settings, process.name
    grace = float(settings.grace) + LAST_STEP + (PRESTOP if process is shop.gateway else 0)
    volumes, mounts = volumes_of(shop, process, source)
    # By these annotations, many setups of Prometheus find /metrics. No other pod can reach live.
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(process.port),
               "prometheus.io/path": "/metrics"}
    annotations = {} if process is shop.live else {"annotations": scraped}
    return {
        "metadata": {"labels": labels(name), **annotations},
        "spec": {
            "containers": [container(shop, process, mounts)],
            "volumes": volumes,
            # The kubelet kills what has not ended by then.
            "terminationGracePeriodSeconds": math.ceil(grace),
            # Otherwise a Service called microshop would set MICROSHOP_PORT=tcp://...
            "enableServiceLinks": False,
            # The first process of a container ignores a SIGTERM for which it has no handler, and
            # Python needs a moment until it has one. Shared, the first is one of Kubernetes' own.
            "shareProcessNamespace": True,
            # The lost packet of a look-up costs 1 s, not 5.
            "dnsConfig": {"options": [{"name": "timeout", "value": "1"},
                                      {"name": "attempts", "value": "2"}]},
            # A process needs no rights in the cluster, and none of root.
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER,
                "fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch",  # so it may write to DATA
                "seccompProfile": {"type": "RuntimeDefault"}},
            # Several gateways run on different machines, if there are enough.
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                 "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": selector(name)}]}}


def volumes_of(shop: Shop, process: Process,
               source: dict[str, Object]) -> tuple[list[Object], list[Object]]:
    """Return the volumes of a pod, without that of its database, and where they are mounted."""
    volumes, mounts = [], []
    for folder, configured in source.items():
        name = folder.replace("/", "-")
        volumes.append({"name": name, "configMap": {"name": configured["metadata"]["name"]}})
        mounts.append({"name": name, "mountPath": f"{SOURCE}/{folder}", "readOnly": True})
    # The rest of the file system is read-only, but SQLite needs temporary files for an index.
    volumes.append({"name": "tmp", "emptyDir": {}})
    mounts.append({"name": "tmp", "mountPath": "/tmp"})
    if process.schema:
        mounts.append({"name": "data", "mountPath": DATA})
    if has_option(process, "token-file"):
        # These pods wait until there is such a Secret: no gateway ever runs without a token.
        volumes.append({"name": "token", "secret": {
            "secretName": shop.settings.token_secret, "optional": False, "defaultMode": 0o440}})
        mounts.append({"name": "token", "mountPath": TOKEN, "readOnly": True})
    return volumes, mounts


def container(shop: Shop, process: Process, mounts: list[Object]) -> Object:
    """Return the container of a pod: the process itself."""
    # When a pod is to end, all nodes are told to send no more clients to it. At the same time, it
    # gets SIGTERM, and then our processes close their port at once. So a gateway sleeps first,
    # until all nodes know. A service has only one pod: to wait would only delay the next one.
    stop = {"lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRESTOP)]}}}}
    return {
        "name": process.name,
        "image": shop.settings.image,
        "command": ["python", "-m", f"microshop.{process.name}"],
        "env": [{"name": name, "value": value}
                for name, value in shop.variables(process).items()],
        "ports": [{"name": "http", "containerPort": process.port}],
        "volumeMounts": mounts,
        **probes(shop, process),
        **(stop if process is shop.gateway else {}),
        # Measured: 28 MiB. A limit on CPU would make a process wait while cores are idle.
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"},
                      "limits": {"memory": "256Mi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]}},
        # `kubectl describe pod` shows the line that says which setting is wrong.
        "terminationMessagePolicy": "FallbackToLogsOnError"}


def probes(shop: Shop, process: Process) -> Object:
    """Return how the kubelet finds out whether a pod is ready, and whether it must be restarted.

    Liveness asks the process alone: gateways must not be restarted because a service hangs.
    """
    def ask(path: str, **times: int) -> Object:
        if process is shop.live:  # the kubelet does not reach 127.0.0.1 of the pod
            code = (f"import urllib.request as r; "
                    f"r.urlopen('http://127.0.0.1:{process.port}{path}', timeout=4)")
            return {"exec": {"command": ["python", "-c", code]}, "timeoutSeconds": 5, **times}
        return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 5, **times}

    return {
        "startupProbe": ask("/health", periodSeconds=1, failureThreshold=60),
        "readinessProbe": ask("/health", periodSeconds=2, failureThreshold=2),
        # After 15 s of silence, a process gets only 1 s to end: one that hangs cannot use more.
        "livenessProbe": ask("/health/live", periodSeconds=5, failureThreshold=3,
                             terminationGracePeriodSeconds=1)}


# --- the network

def make(api: str, kind: str, name: str, spec: Object, of: str = "") -> Object:
    """Return an object of the API. `of` names the process that it is for."""
    return {"apiVersion": api, "kind": kind,
            "metadata": {"name": name, "labels": labels(of or name)}, "spec": spec}


def service(process: Process, port: int, **more: str) -> Object:
    """Return a Service: a name in DNS, and an address that leads to the ready pods of a process.

    While no pod is ready, it refuses connections. (A headless Service has no address of its own:
    its name leads to the addresses of the pods, and would lead nowhere meanwhile.)
    """
    ports = [{"name": "http", "port": port, "targetPort": "http"}]
    return make("v1", "Service", process.name,
                {"selector": labels(process.name), "ports": ports, **more})


def network_policy(shop: Shop, process: Process) -> Object:
    """Return who may call a process, and whom it may call: those that it has a URL for.

    Without `ingress`, no pod may call it; without `egress`, it may call none. Those that call by
    name may also ask any name server.
    """
    name = process.name
    callers: list[Object] = [{"podSelector": selector(caller)} for caller in shop.callers(process)]
    if shop.settings.scrape_from and process is not shop.live:
        namespace = {"kubernetes.io/metadata.name": shop.settings.scrape_from}
        callers.append({"namespaceSelector": {"matchLabels": namespace}})
    ports = [{"port": process.port}]
    spec: Object = {"podSelector": selector(name), "policyTypes": ["Ingress", "Egress"]}
    if process is shop.gateway:
        spec["ingress"] = [{"ports": ports}]  # from everybody
    elif callers:
        spec["ingress"] = [{"from": callers, "ports": ports}]
    if called := callees(process):
        spec["egress"] = [
            *[{"to": [{"podSelector": selector(other)}],
               "ports": [{"port": process_of(other).port}]} for other in called],
            {"ports": [{"port": DNS_PORT, "protocol": kind} for kind in ("UDP", "TCP")]}]
    return make("networking.k8s.io/v1", "NetworkPolicy", name, spec)


# --- the workloads

def stateful_set(shop: Shop, process: Process, template: Object) -> Object:
    """Return what keeps one pod of a service that owns data, always with the same volume.

    It has no PodDisruptionBudget: with one, its machine could not be emptied at all.
    """
    settings = shop.settings
    storage = {"accessModes": ["ReadWriteOnce"],
               "resources": {"requests": {"storage": settings.storage}}}
    if settings.storage_class:
        storage["storageClassName"] = settings.storage_class
    return make("apps/v1", "StatefulSet", process.name, {
        "replicas": 1,  # SQLite has one writer
        "serviceName": process.name,  # its field is required; it names the pod in DNS
        # Otherwise a pod that never gets ready could not be replaced by a repaired one.
        "podManagementPolicy": "Parallel",
        "selector": selector(process.name),
        "template": template,
        "volumeClaimTemplates": [
            {"metadata": {"name": "data", "labels": labels(process.name)}, "spec": storage}]})


def deployment(process: Process, template: Object, **more: object) -> Object:
    """Return what keeps pods of a process that owns no data."""
    return make("apps/v1", "Deployment", process.name,
                {"selector": selector(process.name), "template": template, **more})


def gateway_objects(shop: Shop, template: Object) -> list[Object]:
    """Return the gateways: during a rollout, never fewer than there should be."""
    settings, name = shop.settings, shop.gateway.name
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    # With an autoscaler, a number here would undo its choice at each apply.
    number = {} if settings.autoscale else {"replicas": settings.replicas}
    # Otherwise the clients' addresses would be those of the nodes, and --rate would see these.
    local = {} if settings.expose == "ClusterIP" else {"externalTrafficPolicy": "Local"}
    objects = [
        service(shop.gateway, HTTP_PORT, type=settings.expose, **local),
        deployment(shop.gateway, template, strategy=rolling, **number),
        # While machines are emptied for maintenance, at most one gateway is away.
        make("policy/v1", "PodDisruptionBudget", name,
             {"maxUnavailable": 1, "selector": selector(name)})]
    if settings.autoscale:
        target = {"type": "AverageValue", "averageValue": SCALE_AT}
        objects.append(make("autoscaling/v2", "HorizontalPodAutoscaler", name, {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": settings.replicas, "maxReplicas": settings.autoscale,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]}))
    return objects


def live_objects(shop: Shop, template: Object) -> list[Object]:
    """Return the live picture, and a headless Service: a name with the addresses of all gateways.

    No other pod may call live, and no Service leads to it.
    """
    gateway = shop.gateway
    every_pod = {"clusterIP": "None", "publishNotReadyAddresses": True,
                 "selector": labels(gateway.name),
                 "ports": [{"name": "http", "port": gateway.port}]}
    return [make("v1", "Service", f"{gateway.name}-pods", every_pod, of=gateway.name),
            deployment(shop.live, template, replicas=1)]


def make_manifest(settings: Namespace) -> Object:
    """Return the whole manifest, a List. What others need comes first."""
    shop = Shop(settings)
    config_maps: dict[str, Object] = {}
    templates: dict[str, Object] = {}
    for process in shop.processes:
        source = source_of(shop, process)
        config_maps |= {one["metadata"]["name"]: one for one in source.values()}
        templates[process.name] = pod_template(shop, process, source)
    items = [*config_maps.values(), *[network_policy(shop, one) for one in shop.processes]]
    for one in shop.services:
        items += [service(one, one.port), stateful_set(shop, one, templates[one.name])]
    items += gateway_objects(shop, templates[shop.gateway.name])
    if settings.live:
        items += live_objects(shop, templates[shop.live.name])
    return {"apiVersion": "v1", "kind": "List", "items": items}


# --- the command

def pattern(expression: str, what: str) -> Callable[[str], str]:
    """Return a parser that accepts texts that match; `what` says what they are."""
    def parse(text: str) -> str:
        if not re.fullmatch(expression, text):
            raise ValueError(f"{text!r} is not {what}")
        return text
    return parse


def checked(setting: config.Setting) -> config.Setting:
    """Return a setting whose value is the text that was given: we check it, and pass it on."""
    def parse(text: str) -> str:
        setting.parse(text)
        return text
    return setting._replace(parse=parse)


LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
NAMESPACE = pattern(LABEL, "a namespace: at most 63 of a-z, 0-9 and -, with no - at its ends")
NAME = pattern(rf"{LABEL}([.]{LABEL})*", "a name in Kubernetes, like a-name.of-2-parts")
OPTIONS = [
    config.Setting("image", pattern(r"[0-9A-Za-z][\w.:/@-]*", "the name of an image"),
                   "python:3.12-slim", "image with Python 3.11 or newer"),
    config.Setting("replicas", config.count, "2",
                   "number of gateways (with --autoscale: at least)"),
    config.Setting("autoscale", config.count, None,
                   "let a HorizontalPodAutoscaler add gateways by their load, up to this number "
                   "(the cluster needs a metrics-server)"),
    config.Setting("storage", pattern("[1-9][0-9]*[MGT]i", "a size, like 500Mi or 10Gi"), "1Gi",
                   "size of each database's volume; Kubernetes cannot change it later"),
    config.Setting("storage-class", NAME, None,
                   "class of the volumes, which cannot be changed later, either (default: the "
                   "cluster's own default); not NFS, where SQLite's write-ahead log does not work"),
    config.Setting("expose", pattern("ClusterIP|NodePort|LoadBalancer",
                                     "ClusterIP, NodePort or LoadBalancer"), "ClusterIP",
                   "how the gateway can be reached: ClusterIP (within the cluster, or through an "
                   "Ingress), NodePort or LoadBalancer"),
    config.Setting("token-secret", NAME, "microshop-token",
                   "name of the Secret; its key token has the token that every write needs"),
    config.Setting("scrape-from", NAMESPACE, None,
                   "namespace whose pods may reach the services, so that Prometheus there can read "
                   "/metrics (they can also write: services check no token)"),
    config.Setting("live", config.switch, "", "add the live picture, for kubectl port-forward"),
    config.Setting("no-source", config.switch, "",
                   "leave the source out: to read the manifest, not to apply it"),
    *map(checked, PASSED_ON),
    config.QUIET,
]


def check(settings: Namespace) -> None:
    """Raise ValueError if settings contradict each other."""
    if settings.autoscale and settings.autoscale < settings.replicas:
        raise ValueError(f"--autoscale: {settings.autoscale} is less than the {settings.replicas} "
                         "of --replicas, which are always there")


def main() -> None:
    surroundings.prepare()
    settings = config.read("microshop.kubernetes", OPTIONS, check, purpose=(
        "Print the manifest of a shop on Kubernetes, to be piped into kubectl apply."))
    manifest = make_manifest(settings)
    if settings.no_source:
        manifest["items"] = [item for item in manifest["items"] if item["kind"] != "ConfigMap"]
    try:
        print(json.dumps(manifest, indent=2), flush=True)
    except BrokenPipeError:  # what read our output has ended
        surroundings.discard_output()
        sys.exit(1)
    if sys.stdout.isatty():
        print("kubernetes: to apply this: python -m microshop.kubernetes | kubectl apply "
              "--server-side --force-conflicts -f -\nkubernetes: to read it: "
              "python -m microshop.kubernetes --no-source | less", file=sys.stderr)


if __name__ == "__main__":
    main()
