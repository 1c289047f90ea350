"""Tests of what becomes of the manifest before podman gets it, and of a machine without podman.

The containers themselves run only in `make test-cluster`.
"""
import contextlib
import io
import unittest
from unittest import mock

from tests import cluster, podman
from tests.manifest import Manifest
from tests.peers import Absent

CHANGED_IN_CONTAINER = {"ports", "volumeMounts", "startupProbe", "readinessProbe", "livenessProbe"}


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


if __name__ == "__main__":
    unittest.main()
