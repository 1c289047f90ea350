"""The manifest for Kubernetes: is it consistent, and do its pods' commands run a shop?

No cluster is needed here. `make test-cluster` runs the pods in real containers, and `make
conformance` shows the manifest to the schemas of Kubernetes.
"""
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from microshop import GATEWAY_PORT, LIVE_PORT, SERVICES
from microshop.chassis import config
from microshop.kubernetes import LAST_STEP, PRESTOP, USER
from microshop.live import LiveHandler
from microshop.orders import CALL_TIME
from tests.helpers import TOP, Process, ask, ask_json, clean_environment, wait_until
from tests.manifest import ALL_FLAGS, WORKLOADS, Manifest, selected_by
from tests.source import HOUSE, imported, module_of

MAX_ANNOTATION = 256 * 1024  # bytes; without --server-side, kubectl puts each object into one
TOKEN = "s3cret"
PORTS = {**SERVICES, "gateway": GATEWAY_PORT, "live": LIVE_PORT}

# Every field that an object may have: with one more, Kubernetes would do something that no test
# has thought of, like deleting volumes. Think of it, write a test, and add the field here.
FIELDS = {
    ("v1", "Service"): {
        "selector", "ports", "type", "externalTrafficPolicy", "clusterIP",
        "publishNotReadyAddresses"},
    ("networking.k8s.io/v1", "NetworkPolicy"): {"podSelector", "policyTypes", "ingress", "egress"},
    ("apps/v1", "StatefulSet"): {
        "replicas", "serviceName", "podManagementPolicy", "selector", "template",
        "volumeClaimTemplates"},
    ("apps/v1", "Deployment"): {"replicas", "selector", "template", "strategy"},
    ("policy/v1", "PodDisruptionBudget"): {"maxUnavailable", "selector"},
    ("autoscaling/v2", "HorizontalPodAutoscaler"): {
        "scaleTargetRef", "minReplicas", "maxReplicas", "metrics"}}
FIELDS_OF_PODS = {
    "containers", "volumes", "terminationGracePeriodSeconds", "enableServiceLinks",
    "shareProcessNamespace", "dnsConfig", "automountServiceAccountToken", "securityContext",
    "topologySpreadConstraints"}
FIELDS_OF_CONTAINERS = {
    "name", "image", "command", "env", "ports", "volumeMounts", "startupProbe", "readinessProbe",
    "livenessProbe", "lifecycle", "resources", "securityContext", "terminationMessagePolicy"}
FIELDS_OF_MOUNTS = {"name", "mountPath", "readOnly"}

SCRAPER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
NAME_SERVERS = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}


class ConsistentTest(unittest.TestCase):
    """What one object says of another must be true."""

    @classmethod
    def setUpClass(cls):
        cls.manifest = Manifest(*ALL_FLAGS)

    def test_no_two_objects_of_a_kind_have_the_same_name(self):
        names = [(item["kind"], item["metadata"]["name"]) for item in self.manifest.items]
        self.assertEqual(sorted(names), sorted(set(names)))

    def test_no_object_has_a_field_that_these_tests_do_not_know(self):
        for item in self.manifest.items:
            kind = (item["apiVersion"], item["kind"])
            if item["kind"] != "ConfigMap":
                with self.subTest(f"{item['kind']} {item['metadata']['name']}"):
                    self.assertIn(kind, FIELDS)
                    self.assertLessEqual(item["spec"].keys(), FIELDS[kind])
        for name in self.manifest.templates():
            with self.subTest(f"pod {name}"):
                self.assertLessEqual(self.manifest.pod(name).keys(), FIELDS_OF_PODS)
                container = self.manifest.container(name)
                self.assertLessEqual(container.keys(), FIELDS_OF_CONTAINERS)
                options = self.manifest.pod(name)["dnsConfig"]["options"]
                self.assertEqual(options, [{"name": "timeout", "value": "1"},
                                           {"name": "attempts", "value": "2"}])
                [spread] = self.manifest.pod(name)["topologySpreadConstraints"]
                self.assertEqual((spread["topologyKey"], spread["whenUnsatisfiable"]),
                                 ("kubernetes.io/hostname", "ScheduleAnyway"))
                for mount in container["volumeMounts"]:
                    self.assertLessEqual(mount.keys(), FIELDS_OF_MOUNTS)

    def test_every_process_has_a_workload_and_the_services_with_data_have_volumes(self):
        self.assertEqual(self.manifest.of_kind("StatefulSet").keys(), SERVICES.keys())
        deployments = self.manifest.of_kind("Deployment")
        self.assertEqual(deployments.keys(), {"gateway", "live"})
        self.assertEqual(deployments["live"]["spec"]["replicas"], 1)
        for name, item in self.manifest.of_kind("StatefulSet").items():
            with self.subTest(name):
                self.assertEqual(item["spec"]["replicas"], 1, "SQLite has one writer")
                self.assertEqual(item["spec"]["podManagementPolicy"], "Parallel",
                                 "else a pod that is never ready blocks the repaired one")
                [claim] = item["spec"]["volumeClaimTemplates"]
                self.assertEqual(claim["spec"]["accessModes"], ["ReadWriteOnce"])
                self.assertEqual(claim["metadata"]["labels"]["app.kubernetes.io/part-of"],
                                 "microshop", "the README finds the volumes by this label")
                self.assertIn({"name": claim["metadata"]["name"],
                               "mountPath": self.manifest.variables(name)["MICROSHOP_DATA"]},
                              self.manifest.container(name)["volumeMounts"])

    def test_every_selector_selects_the_pods_of_its_process_and_no_others(self):
        templates = self.manifest.templates()
        for kind, name, selector in self.selectors():
            with self.subTest(f"{kind} {name}"):
                own = "gateway" if name == "gateway-pods" else name
                self.assertEqual(selected_by(selector, templates), {own},
                                 f"the workloads whose pods {selector} selects")

    def selectors(self):
        """Yield kind, name and labels of each selector that is about an object's own pods."""
        for item in self.manifest.items:
            kind, name, spec = item["kind"], item["metadata"]["name"], item.get("spec", {})
            if kind == "Service":
                yield kind, name, spec["selector"]
            elif kind == "NetworkPolicy":
                yield kind, name, spec["podSelector"]["matchLabels"]
            elif kind not in ("ConfigMap", "HorizontalPodAutoscaler"):
                yield kind, name, spec["selector"]["matchLabels"]
            for spread in spec.get("template", {}).get("spec", {}).get(
                    "topologySpreadConstraints", []):
                yield f"{kind}, spread,", name, spread["labelSelector"]["matchLabels"]

    def test_every_url_leads_to_a_service_with_that_port_and_on_to_a_port_of_the_pods(self):
        services = self.manifest.of_kind("Service")
        for name in self.manifest.templates():
            for variable, url in self.manifest.variables(name).items():
                if not variable.endswith("_URL"):
                    continue
                with self.subTest(f"{variable} of {name}"):
                    self.assertTrue(config.is_base_url(url), url)
                    host, port = url.removeprefix("http://").split(":")
                    [entry] = services[host]["spec"]["ports"]
                    self.assertEqual(entry["port"], int(port), f"the port of the Service {host}")
        for name, service in services.items():
            with self.subTest(f"Service {name}"):
                [entry] = service["spec"]["ports"]
                self.assertLessEqual(entry.keys(), {"name", "port", "targetPort"})
                self.assertEqual("clusterIP" in service["spec"], name == "gateway-pods",
                                 "without an address, a name vanishes while no pod is ready")
                [pods] = selected_by(service["spec"]["selector"], self.manifest.templates())
                [port] = self.manifest.container(pods)["ports"]
                self.assertIn(entry.get("targetPort", entry["port"]),
                              (port["name"], port["containerPort"]))

    def test_a_container_listens_on_the_port_that_it_names(self):
        for name in self.manifest.templates():
            with self.subTest(name):
                [port] = self.manifest.container(name)["ports"]
                self.assertEqual(port["containerPort"], PORTS[name])
                variables = self.manifest.variables(name)
                self.assertEqual(variables["MICROSHOP_PORT"], str(PORTS[name]))
                # live shows everything: only its own pod may reach it
                self.assertEqual(variables.get("MICROSHOP_HOST"),
                                 None if name == "live" else "0.0.0.0")

    def test_prometheus_is_told_the_port_of_every_process_that_it_can_reach(self):
        for name, template in self.manifest.templates().items():
            with self.subTest(name):
                told = template["metadata"].get("annotations", {}).get("prometheus.io/port")
                self.assertEqual(told, None if name == "live" else str(PORTS[name]))

    def test_live_finds_the_address_of_every_gateway_also_of_one_that_is_not_ready(self):
        spec = self.manifest.of_kind("Service")["gateway-pods"]["spec"]
        self.assertEqual((spec["clusterIP"], spec["publishNotReadyAddresses"]), ("None", True))

    def test_at_most_one_gateway_may_be_away_while_machines_are_drained(self):
        budgets = self.manifest.of_kind("PodDisruptionBudget")
        self.assertEqual(budgets.keys(), {"gateway"},
                         "one for a service would forbid to drain its machine")
        self.assertEqual(budgets["gateway"]["spec"]["maxUnavailable"], 1)

    def test_every_probe_asks_for_a_path_that_every_process_has(self):
        for name in self.manifest.templates():
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                with self.subTest(f"{kind} of {name}"):
                    probe = self.manifest.container(name)[kind]
                    path = "/health/live" if kind == "livenessProbe" else "/health"
                    self.assertIn(path, LiveHandler.all_routes)
                    self.assertGreaterEqual(probe["timeoutSeconds"], 3, "a busy process is slow")
                    self.assertGreaterEqual(probe["failureThreshold"],
                                            {"startupProbe": 30, "livenessProbe": 3}.get(kind, 2))
                    if name == "live":  # it listens inside the pod only
                        self.assertIn(f"http://127.0.0.1:{LIVE_PORT}{path}'",
                                      probe["exec"]["command"][-1])
                    else:
                        self.assertEqual(probe["httpGet"], {"path": path, "port": "http"})

    def test_every_volume_that_is_mounted_exists_and_every_volume_is_mounted(self):
        config_maps = self.manifest.of_kind("ConfigMap")
        for name, item in self.manifest.of_kind(*WORKLOADS).items():
            with self.subTest(name):
                claims = [claim["metadata"]["name"]
                          for claim in item["spec"].get("volumeClaimTemplates", [])]
                volumes = [volume["name"] for volume in self.manifest.pod(name)["volumes"]]
                mounts = self.manifest.container(name)["volumeMounts"]
                self.assertEqual(sorted(mount["name"] for mount in mounts),
                                 sorted(volumes + claims))
                written = {mount["name"] for mount in mounts if not mount.get("readOnly")}
                self.assertEqual(written, {"tmp", *claims}, "what the process may write to")
                paths = [mount["mountPath"] for mount in mounts]
                self.assertEqual(len(set(paths)), len(paths), f"{paths} must all differ")
                for volume in self.manifest.pod(name)["volumes"]:
                    if "configMap" in volume:
                        self.assertIn(volume["configMap"]["name"], config_maps)

    def test_the_network_lets_those_through_that_have_a_url_and_no_others(self):
        templates = self.manifest.templates()
        policies = self.manifest.of_kind("NetworkPolicy")
        self.assertEqual(policies.keys(), templates.keys(), "whom a NetworkPolicy protects")
        for name, policy in policies.items():
            spec = policy["spec"]
            self.assertEqual(spec["policyTypes"], ["Ingress", "Egress"], name)
            callers = {other for other in templates
                       if f"MICROSHOP_{name.upper()}_URL" in self.manifest.variables(other)}
            called = {other for other in templates
                      if f"MICROSHOP_{other.upper()}_URL" in self.manifest.variables(name)}
            with self.subTest(name):
                self.assertEqual(self.let_in(spec), {"gateway": None, "live": set()}.get(
                    name, callers), f"the processes that may call {name}")
                self.assertEqual(self.let_out(spec), called, f"those that {name} may call")

    def let_in(self, spec):
        """Return the workloads that a NetworkPolicy lets in, or None if it lets in everybody.

        It may let in the namespace of --scrape-from besides.
        """
        [name] = selected_by(spec["podSelector"]["matchLabels"], self.manifest.templates())
        found = set()
        for rule in spec.get("ingress", []):
            self.assertEqual(rule["ports"], [{"port": PORTS[name]}], f"open ports of {name}")
            if "from" not in rule:
                return None
            for peer in rule["from"]:
                if peer == SCRAPER:
                    continue
                self.assertEqual(peer.keys(), {"podSelector"}, "pods of other namespaces")
                found |= selected_by(peer["podSelector"]["matchLabels"], self.manifest.templates())
        return found

    def let_out(self, spec):
        """Return the workloads that a NetworkPolicy lets its pods call, at their ports."""
        found = set()
        for rule in spec.get("egress", []):
            if rule == NAME_SERVERS:
                continue
            for peer in rule["to"]:
                [name] = selected_by(peer["podSelector"]["matchLabels"], self.manifest.templates())
                self.assertEqual(rule["ports"], [{"port": PORTS[name]}], name)
                found.add(name)
        return found

    def test_whoever_calls_by_name_may_ask_a_name_server(self):
        for name, policy in self.manifest.of_kind("NetworkPolicy").items():
            with self.subTest(name):
                has_url = any(variable.endswith("_URL")
                              for variable in self.manifest.variables(name))
                self.assertEqual(NAME_SERVERS in policy["spec"].get("egress", []), has_url)

    def test_a_pod_has_time_to_end_before_it_is_killed(self):
        self.assertGreater(LAST_STEP, CALL_TIME, "after the drain, the saga may make one more call")
        self.assertTrue(2 < PRESTOP < 30, "seconds until all nodes know that a gateway ends")
        grace = float(self.manifest.variables("orders")["MICROSHOP_GRACE"])
        for name in self.manifest.templates():
            hook = self.manifest.container(name).get("lifecycle", {})
            with self.subTest(name):
                self.assertEqual(bool(hook), name == "gateway", "who needs a preStop")
                self.assertEqual(self.manifest.pod(name)["terminationGracePeriodSeconds"],
                                 math.ceil(grace + LAST_STEP + (PRESTOP if hook else 0)))
                self.assertEqual(
                    self.manifest.container(name)["livenessProbe"]["terminationGracePeriodSeconds"],
                    1, "a process that hangs drains nothing")

    def test_the_command_before_the_end_exists(self):
        command = self.manifest.container("gateway")["lifecycle"]["preStop"]["exec"]["command"]
        self.assertTrue(shutil.which(command[0]), command)

    def test_no_pod_may_do_more_than_it_must(self):
        """This is what PodSecurity `restricted` demands, and a little more."""
        self.assertGreater(USER, 0, "0 is root")
        for name in self.manifest.templates():
            pod, container = self.manifest.pod(name), self.manifest.container(name)
            with self.subTest(name):
                self.assertEqual(pod["securityContext"], {
                    "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER,
                    "fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch",
                    "seccompProfile": {"type": "RuntimeDefault"}})
                self.assertEqual(container["securityContext"], {
                    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]}})
                self.assertFalse(pod["automountServiceAccountToken"])
                self.assertFalse(pod["enableServiceLinks"], "a Service could set MICROSHOP_PORT")
                self.assertTrue(pod["shareProcessNamespace"], "else an early SIGTERM is lost")
                self.assertIn({"name": "tmp", "emptyDir": {}}, pod["volumes"],
                              "SQLite needs temporary files")

    def test_only_gateway_and_live_get_the_token_and_they_wait_for_it(self):
        for name in self.manifest.templates():
            with self.subTest(name):
                secrets = [volume["secret"] for volume in self.manifest.pod(name)["volumes"]
                           if "secret" in volume]
                wanted = {"secretName": "microshop-token", "optional": False, "defaultMode": 0o440}
                self.assertEqual(secrets, [wanted] if name in ("gateway", "live") else [])


class SourceTest(unittest.TestCase):
    """The source that the ConfigMaps carry."""

    def test_the_config_maps_restore_the_source_byte_for_byte(self):
        manifest = Manifest("--live")
        for name in manifest.templates():
            for path, text in manifest.source_of(name).items():
                with self.subTest(f"{path} of {name}"):
                    original = TOP / path.removeprefix("/app/")
                    self.assertEqual(text.encode(), original.read_bytes(), f"{original}")

    def test_a_pod_has_every_module_that_it_imports(self):
        manifest = Manifest("--live")
        known = {module_of(path.relative_to(HOUSE).as_posix()) for path in HOUSE.rglob("*.py")}
        for name in manifest.templates():
            source = manifest.source_of(name)
            present = {module_of(path.removeprefix("/app/microshop/")) for path in source}
            for path, text in source.items():
                if path.endswith(".py"):
                    with self.subTest(f"{path} of {name}"):
                        self.assertLessEqual(known & imported(text), present)

    def test_a_pod_has_the_module_of_no_other_process(self):
        manifest = Manifest("--live")
        own = {"gateway": {"gateway.py", "audit.py"}, "live": {"live.py", "live.html"}}
        for name in manifest.templates():
            files = {path.removeprefix("/app/microshop/") for path in manifest.source_of(name)}
            with self.subTest(name):
                self.assertEqual({file for file in files if "/" not in file},
                                 {"__init__.py"} | own.get(name, {f"{name}.py"}))

    def test_config_maps_are_immutable_and_below_250_000_bytes(self):
        for name, item in Manifest("--live").of_kind("ConfigMap").items():
            with self.subTest(name):
                self.assertIs(item["immutable"], True)
                size = sum(len(text.encode()) for text in item["data"].values())
                self.assertLess(size, 250_000, f"bytes of source in {name}")
                self.assertLess(len(json.dumps(item)), MAX_ANNOTATION,
                                f"{name}: kubectl apply without --server-side would refuse it")

    def test_pods_share_the_chassis_if_they_need_the_same_of_it(self):
        manifest = Manifest("--live")
        chassis = {name: {volume["configMap"]["name"] for volume in manifest.pod(name)["volumes"]
                          if volume["name"] == "microshop-chassis"}
                   for name in manifest.templates()}
        for name in (*SERVICES, "live"):
            with self.subTest(name):
                self.assertEqual(chassis[name], chassis["gateway"])

    def test_a_change_of_one_service_is_a_rollout_of_that_service_alone(self):
        self.assertEqual(self.rolled_out("orders.py"), {"orders"})

    def test_a_change_of_the_chassis_is_a_rollout_of_every_process(self):
        self.assertEqual(self.rolled_out("chassis/wire.py"), {*SERVICES, "gateway"})

    def test_a_change_of_what_runs_on_one_machine_only_is_no_rollout(self):
        self.assertEqual(self.rolled_out("chassis/supervisor.py"), set())

    def rolled_out(self, changed):
        """Return the workloads whose pod template differs after a file was changed."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(HOUSE, Path(folder) / "microshop")
            before = self.printed_templates(folder)
            with (Path(folder) / "microshop" / changed).open("a") as file:
                file.write("\n# changed\n")
            after = self.printed_templates(folder)
        return {name for name, template in after.items() if template != before[name]}

    def printed_templates(self, folder):
        done = subprocess.run([sys.executable, "-B", "-m", "microshop.kubernetes"], cwd=folder,
                              capture_output=True, text=True, env=clean_environment())
        self.assertEqual(done.stderr, "")
        return {item["metadata"]["name"]: item["spec"]["template"]
                for item in json.loads(done.stdout)["items"] if "template" in item.get("spec", {})}


class SettingsTest(unittest.TestCase):
    def test_without_flags_nothing_but_the_necessary_is_set(self):
        manifest = Manifest()
        self.assertEqual(manifest.variables("users"), {
            "MICROSHOP_HOST": "0.0.0.0", "MICROSHOP_PORT": "3001", "MICROSHOP_DATA": "/data",
            "PYTHONPATH": "/app", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"})
        self.assertEqual(manifest.container("users")["image"], "python:3.12-slim")
        self.assertEqual(manifest.of_kind("Deployment").keys(), {"gateway"})
        self.assertEqual(manifest.of_kind("HorizontalPodAutoscaler"), {})
        gateway = manifest.of_kind("Deployment")["gateway"]["spec"]
        self.assertEqual(gateway["replicas"], 2)
        self.assertEqual(gateway["strategy"], {
            "type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}})
        [port] = manifest.of_kind("Service")["gateway"]["spec"]["ports"]
        self.assertEqual(port["port"], 80)
        self.assertEqual(manifest.container("gateway")["resources"], {
            "requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}})

    def test_settings_of_the_shop_reach_the_processes_that_have_them(self):
        manifest = Manifest("--timeout=3", "--rate=100/s", "--max-in-flight=7", "--quiet",
                            "--max-connections=50", "--grace=2")
        of_all = {"MICROSHOP_TIMEOUT": "3", "MICROSHOP_QUIET": "1", "MICROSHOP_GRACE": "2",
                  "MICROSHOP_MAX_CONNECTIONS": "50"}
        of_gateway = {"MICROSHOP_RATE": "100/s", "MICROSHOP_MAX_IN_FLIGHT": "7"}
        for name in manifest.templates():
            with self.subTest(name):
                given = manifest.variables(name)
                self.assertLessEqual(of_all.items(), given.items())
                self.assertEqual(of_gateway.items() <= given.items(), name == "gateway")

    def test_with_an_autoscaler_the_manifest_does_not_say_how_many_gateways_there_are(self):
        manifest = Manifest("--replicas=3", "--autoscale=6")
        self.assertNotIn("replicas", manifest.of_kind("Deployment")["gateway"]["spec"],
                         "each apply would undo what the autoscaler has chosen")
        scaler = manifest.of_kind("HorizontalPodAutoscaler")["gateway"]["spec"]
        self.assertEqual((scaler["minReplicas"], scaler["maxReplicas"]), (3, 6))
        self.assertEqual(scaler["scaleTargetRef"], {
            "apiVersion": "apps/v1", "kind": "Deployment", "name": "gateway"})
        self.assertEqual(scaler["metrics"], [{"type": "Resource", "resource": {
            "name": "cpu", "target": {"type": "AverageValue", "averageValue": "700m"}}}])

    def test_other_flags_are_found_where_they_belong(self):
        manifest = Manifest("--image=registry.example/python@sha256:0f", "--storage=20Gi",
                            "--storage-class=fast", "--expose=NodePort", "--token-secret=other",
                            "--scrape-from=monitoring")
        self.assertEqual(manifest.container("users")["image"], "registry.example/python@sha256:0f")
        [claim] = manifest.of_kind("StatefulSet")["users"]["spec"]["volumeClaimTemplates"]
        self.assertEqual(claim["spec"]["storageClassName"], "fast")
        self.assertEqual(claim["spec"]["resources"]["requests"]["storage"], "20Gi")
        gateway = manifest.of_kind("Service")["gateway"]["spec"]
        self.assertEqual((gateway["type"], gateway["externalTrafficPolicy"]), ("NodePort", "Local"),
                         "with another policy, --rate would see the addresses of the nodes")
        self.assertEqual(manifest.of_kind("Service")["users"]["spec"].get("type", "ClusterIP"),
                         "ClusterIP", "only the gateway can be reached from outside")
        self.assertIn("other", [volume.get("secret", {}).get("secretName")
                                for volume in manifest.pod("gateway")["volumes"]])
        [rule] = manifest.of_kind("NetworkPolicy")["users"]["spec"]["ingress"]
        self.assertIn(SCRAPER, rule["from"])

    def test_a_bad_value_gets_one_line_that_names_it(self):
        for flag in ("--image=", "--image=a b", "--replicas=0", "--autoscale=1", "--autoscale=x",
                     "--storage=10", "--storage=big", "--storage-class=Fast!", "--expose=Public",
                     "--image=:x", "--storage-class=a..b", "--token-secret=a.-b",
                     "--scrape-from=a.b", f"--scrape-from={'a' * 64}",
                     "--token-secret=", "--scrape-from=A", "--rate=fast", "--timeout=0",
                     "--grace=-1", "--max-in-flight=many"):
            with self.subTest(flag):
                with contextlib.redirect_stderr(io.StringIO()) as printed:
                    with self.assertRaises(SystemExit) as end:
                        Manifest(flag)
                line = f"python -m microshop.kubernetes: {flag.partition('=')[0]}: "
                self.assertEqual(end.exception.code, 2)
                self.assertRegex(printed.getvalue(), rf"\A{line}.* \(see --help\)\n\Z")

    def test_two_runs_print_the_same_and_the_environment_counts(self):
        first, second = run_tool(), run_tool()
        self.assertEqual(first.stdout, second.stdout)
        manifest = json.loads(first.stdout)
        self.assertEqual((manifest["apiVersion"], manifest["kind"]), ("v1", "List"))
        self.assertIn('"python:3.13-slim"', run_tool(MICROSHOP_IMAGE="python:3.13-slim").stdout)

    def test_a_reader_that_ends_early_gets_no_traceback(self):
        command = f"{sys.executable} -m microshop.kubernetes | head -n 1"
        done = subprocess.run(["sh", "-c", command], cwd=TOP, capture_output=True, text=True,
                              env=clean_environment())
        self.assertEqual((done.stdout, done.stderr), ("{\n", ""))


def run_tool(*flags, **environment):
    return subprocess.run([sys.executable, "-m", "microshop.kubernetes", *flags], cwd=TOP,
                          capture_output=True, text=True, env=clean_environment(**environment))


class Pod:
    """Runs the command of a pod on this machine: its source, its environment, its folders.

    Names of Services are replaced by the addresses at which the other pods listen here, and the
    folders of the volumes by folders below `root`. The user is the pod's if that is possible.
    """

    def __init__(self, manifest: Manifest, name: str, root: Path, urls: dict[str, str],
                 user: int | None):
        self.manifest, self.name = manifest, name
        self.root = root / name
        self.root.mkdir(mode=0o755)
        manifest.write_source(name, self.root)
        for folder in ("data", "tmp", "run/microshop"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "run/microshop/token").write_text(TOKEN)
        if user is not None:
            os.chown(self.root / "data", user, user)
            os.chown(self.root / "tmp", user, user)
        self.environment = {**self.local_variables(urls), "TMPDIR": str(self.root / "tmp")}
        self.user = user
        self.process = self.run(*manifest.container(name)["command"])

    def local_variables(self, urls: dict[str, str]) -> dict[str, str]:
        changed = {"MICROSHOP_HOST": "127.0.0.1", "MICROSHOP_PORT": "0"}
        variables = {}
        for name, value in self.manifest.variables(self.name).items():
            if value.startswith("/"):
                value = f"{self.root}{value}"
            elif name.endswith("_URL"):
                value = urls[name.removeprefix("MICROSHOP_").removesuffix("_URL").lower()]
            variables[name] = changed[name] if name in changed else value
        return variables

    def run(self, *command: str) -> Process:
        """Run a command in the pod."""
        self.assert_is_python(command)
        return Process(*command[2:], folder=self.root, user=self.user, **self.environment)

    def assert_is_python(self, command: tuple[str, ...]) -> None:
        if command[:2] != ("python", "-m"):
            raise AssertionError(f"{command} does not begin with python -m")

    def probe(self, kind: str) -> int:
        """Return the status with which the pod answers a probe."""
        probe = self.manifest.container(self.name)[kind]
        if "httpGet" in probe:
            return ask(self.port, target=probe["httpGet"]["path"]).status
        python, *rest = probe["exec"]["command"]
        command = [sys.executable, *[part.replace(f":{LIVE_PORT}/", f":{self.port}/")
                                     for part in rest]]
        assert python == "python", f"{probe} does not run python"
        return 200 if subprocess.run(command, capture_output=True).returncode == 0 else 0

    @property
    def port(self) -> int:
        return int(self.process.wait_for(r" at http://\S+:(\d+)$")[1])


def unprivileged_user() -> int | None:
    """Return the user of the pods if we may become that, and it can run this Python."""
    if os.geteuid() != 0:
        return None
    try:
        subprocess.run([sys.executable, "-c", ""], user=USER, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return USER


class RunTest(unittest.TestCase):
    """Each container's command is run as the manifest says, on this machine."""

    def setUp(self):
        root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        root.chmod(0o755)
        self.manifest, self.pods = Manifest("--live", "--grace=3"), {}
        user = unprivileged_user()
        for name in (*SERVICES, "gateway", "live"):  # each after those that it calls
            urls = {other: f"http://127.0.0.1:{pod.port}" for other, pod in self.pods.items()}
            self.pods[name] = Pod(self.manifest, name, root, urls, user)
            self.addCleanup(self.pods[name].process.close)
        self.gateway = self.pods["gateway"].port

    def test_the_pods_commands_run_a_shop_and_end_in_good_order(self):
        self.every_probe_is_answered()
        self.a_write_needs_the_token()
        self.an_order_is_confirmed()
        self.the_audit_in_the_gateways_pod_finds_agreement()
        self.every_process_ends_with_status_0()

    def every_probe_is_answered(self):
        for name, pod in self.pods.items():
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                self.assertEqual(pod.probe(kind), 200, f"{kind} of {name}")
        wait_until(lambda: ask(self.gateway, target="/health").json["status"] == "ok",
                   "the gateway to find every service healthy")

    def a_write_needs_the_token(self):
        answer = ask_json(self.gateway, "POST", "/orders", {"userId": 1, "productId": 101})
        self.assertEqual(answer.status, 401, "a write without the token")

    def an_order_is_confirmed(self):
        answer = ask_json(self.gateway, "POST", "/orders", {"userId": 1, "productId": 101},
                          Authorization=f"Bearer {TOKEN}")
        self.assertEqual(answer.status, 201, f"POST /orders was answered {answer.body}")

    def the_audit_in_the_gateways_pod_finds_agreement(self):
        audit = self.pods["gateway"].run("python", "-m", "microshop.audit", "--remote")
        self.addCleanup(audit.close)
        self.assertEqual(audit.status(), 0, audit.last_lines())

    def every_process_ends_with_status_0(self):
        for name in ("live", "gateway", *SERVICES):
            self.assertEqual(self.pods[name].process.stop(), 0, f"exit status of {name}")


if __name__ == "__main__":
    unittest.main()
