"""Tests of what calls the judges from outside: it must notice a failure, and say what is missing.

The judges themselves are not called here: they need packages.
"""
import contextlib
import io
import shutil
import tomllib
import unittest
from pathlib import Path
from unittest import mock

from tests import conformance, front, peers
from tests.peers import Absent


def run(*arguments: str) -> tuple[int, str]:
    """Return the exit status of `python -m tests.conformance`, and what it prints."""
    with (contextlib.redirect_stdout(io.StringIO()) as output,
          contextlib.suppress(SystemExit)):
        try:
            conformance.main(arguments)
        except SystemExit as end:
            return end.code, output.getvalue()
    raise AssertionError("main() did not exit")


class ExitTest(unittest.TestCase):
    def test_without_packages_it_says_so_in_one_line_and_fails_unless_told_otherwise(self):
        absent = mock.patch.object(peers, "start", side_effect=Absent("pip install failed: no net"))
        for arguments, status in (([], 1), (["--if-possible"], 0)):
            with absent:
                self.assertEqual(run(*arguments), (
                    status, "conformance is not checked: pip install failed: no net\n"), arguments)

    def test_with_packages_the_status_says_whether_a_check_has_failed(self):
        tools = mock.patch.object(
            conformance, "environment", lambda: contextlib.nullcontext(Path("tools")))
        for failures, status in ((0, 0), (2, 1)):
            with tools, mock.patch.object(conformance, "judge", return_value=failures):
                self.assertEqual(run("--if-possible")[0], status, f"{failures} failures")


class KubectlTest(unittest.TestCase):
    SERVICE = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "users"},
               "spec": {"selector": {"app": "users"}, "ports": [{"port": 3001}]}}

    def test_what_was_sent_and_has_not_come_back_is_named_and_what_was_added_is_not(self):
        sent = {"spec": {"ports": [{"port": 80, "prot": "TCP"}], "replicas": 2, "hosts": ["a"]}}
        returned = {"spec": {"ports": [{"port": 80}, {}], "replicas": 3, "hosts": []}, "status": {}}
        self.assertEqual(list(conformance.lost(sent, returned)),
                         [".spec.ports[0].prot", ".spec.replicas", ".spec.hosts"])

    @unittest.skipUnless(shutil.which("kubectl"), "kubectl is not installed")
    def test_kubectl_notices_a_misspelt_field_a_wrong_type_and_an_unknown_version(self):
        spec = self.SERVICE["spec"]
        for change, error in (
                ({}, None), ({"spec": {**spec, "prots": []}}, r"kubectl knows no \.spec\.prots$"),
                ({"spec": {**spec, "ports": "80"}}, "cannot unmarshal string"),
                ({"apiVersion": "v7"}, 'no kind "Service" is registered for version "v7"')):
            with self.subTest(change=change):
                errors = conformance.errors_of_kubectl({**self.SERVICE, **change})
                self.assertRegex("".join(errors), error or "^$")


class FrontTest(unittest.TestCase):
    def test_a_block_is_used_as_it_is_apart_from_what_must_be_replaced(self):
        self.assertEqual(front.replaced("listen 80;", {"80": "8080"}), "listen 8080;")
        with self.assertRaisesRegex(AssertionError, "does not contain '443'"):
            front.replaced("listen 80;", {"443": "8443"})

    def test_a_block_that_the_readme_does_not_have_is_an_error(self):
        with self.assertRaisesRegex(AssertionError, "the README has 0 blocks ```fortran, not one"):
            front.block("fortran")


class DifferencesTest(unittest.TestCase):
    def test_they_are_valid_settings_and_each_has_its_reason(self):
        settings = tomllib.loads(conformance.settings())
        self.assertEqual(settings["operations"][0]["include-name"], "POST /orders")
        self.assertIn("412", settings["checks"]["positive_data_acceptance"]["expected-statuses"])
        for difference in conformance.DIFFERENCES:
            self.assertGreater(len(difference.reason), 20, difference)


if __name__ == "__main__":
    unittest.main()
