"""Tests of what becomes of the manifest before podman gets it, and of a machine without podman.

The containers themselves run only in `make test-cluster`.
"""
import contextlib
import io
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from tests import cluster, podman
from tests.helpers import PATIENCE, TOP
from tests.manifest import Manifest
from tests.peers import Absent
from tests.report import Failed

CHANGED_IN_CONTAINER = {"ports", "volumeMounts", "startupProbe", "readinessProbe", "livenessProbe"}
# Runs a process apart that ends by itself only after a test would have failed.
RUN_APART = f"""if True:
    from tests.podman import run_apart
    run_apart(["sh", "-c", "echo started; exec sleep {2 * PATIENCE:g}"])
"""


def without(content: dict, keys: set[str]) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


class PodTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.manifest = Manifest()
        cls.pods = podman.pods_of(cls.manifest.content)

    def test_every_workload_becomes_the_pods_that_kubernetes_makes_of_it(self):
        self.assertEqual([pod.name for pod in self.pods],
                         ["users", "products", "orders", "gateway-0", "gateway-1"])
        self.assertEqual(len({pod.port for pod in self.pods}), len(self.pods), "ports are shared")

    def test_a_pod_is_as_its_workload_says_but_for_volumes_ports_and_probes(self):
        for pod in self.pods:
            template = self.manifest.pod(pod.name.partition("-")[0])
            spec = pod.document["spec"]
            with self.subTest(pod.name):
                self.assertEqual(without(spec, {"containers", "volumes"}),
                                 without(template, {"containers", "volumes"}))
                self.assertEqual(without(spec["containers"][0], CHANGED_IN_CONTAINER),
                                 without(template["containers"][0], CHANGED_IN_CONTAINER))

    def test_every_mount_has_a_volume_and_pods_share_only_what_nobody_changes(self):
        private = []
        for pod in self.pods:
            volumes = {volume["name"]: volume for volume in pod.document["spec"]["volumes"]}
            mounts = pod.document["spec"]["containers"][0]["volumeMounts"]
            self.assertEqual({mount["name"] for mount in mounts}, volumes.keys(), pod.name)
            private += [name for name, volume in volumes.items() if "emptyDir" in volume]
            private += [volume["persistentVolumeClaim"]["claimName"]
                        for volume in volumes.values() if "persistentVolumeClaim" in volume]
        self.assertEqual(sorted(private), sorted(set(private)), "volumes that two pods share")


class ApartTest(unittest.TestCase):
    def test_empty_cgroups_of_podman_are_removed_before_and_after_a_run_and_no_others(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(mock.patch.object(podman, "CGROUPS", folder))

        def make(*names: str) -> None:
            for name in names:
                (folder / name).mkdir(parents=True)

        def found() -> list[str]:
            return sorted(str(path.relative_to(folder)) for path in folder.rglob("*/"))

        make("cpu/another", "cpu/libpod_parent/killed-run/container", "pids/libpod_parent/in-use")
        (folder / "pids/libpod_parent/in-use/process").touch()
        rest = ["cpu", "cpu/another", "pids", "pids/libpod_parent", "pids/libpod_parent/in-use"]
        with podman.cgroups_removed():
            self.assertEqual(found(), rest, "folders when the run begins")
            make("cpu/libpod_parent/this-run/container")
        self.assertEqual(found(), rest, "folders after the run")

    def test_when_it_is_killed_the_processes_in_its_namespaces_are_killed_too(self):
        try:
            podman.run_apart(["true"])
        except Absent as absent:
            self.skipTest(str(absent))
        run = subprocess.Popen([sys.executable, "-c", RUN_APART], cwd=TOP, stdout=subprocess.PIPE)
        self.enterContext(run)
        self.assertEqual(run.stdout.readline(), b"started\n")
        run.kill()
        try:
            run.communicate(timeout=PATIENCE)  # until no process can write to the pipe
        except subprocess.TimeoutExpired:
            self.fail(f"the process inside still runs {PATIENCE:g} s after run_apart() was killed")


class ExitTest(unittest.TestCase):
    def run_main(self, outcome: dict, *arguments: str) -> tuple[int, str]:
        """Return the exit status of `python -m tests.cluster`, and what it prints."""
        with (mock.patch.object(cluster, "run_apart", **outcome), mock.patch("signal.signal"),
              contextlib.redirect_stdout(io.StringIO()) as output,
              self.assertRaises(SystemExit) as end):
            cluster.main(arguments)
        return end.exception.code, output.getvalue()

    def test_without_podman_it_says_so_in_one_line_and_fails_unless_told_otherwise(self):
        absent = {"side_effect": Absent("podman not found")}
        line = "the cluster is not tried: podman not found\n"
        self.assertEqual(self.run_main(absent), (1, line))
        self.assertEqual(self.run_main(absent, "--if-possible"), (0, line))

    def test_with_podman_the_status_says_whether_a_check_has_failed(self):
        for status in (0, 1):
            self.assertEqual(self.run_main({"return_value": status}, "--if-possible"), (status, ""))

    def test_the_last_line_says_that_all_is_well_or_what_is_not(self):
        for audit, expected in ((mock.Mock(), (0, "all 10 checks passed")),
                                (mock.Mock(side_effect=Failed("too few")), (1, "        too few"))):
            checks = mock.Mock(audit=audit)  # its other methods find nothing wrong
            with (mock.patch.object(cluster, "Cluster", return_value=checks),
                  contextlib.redirect_stdout(io.StringIO()) as output):
                status = cluster.judge()
            self.assertEqual((status, output.getvalue().splitlines()[-1]), expected)


if __name__ == "__main__":
    unittest.main()
