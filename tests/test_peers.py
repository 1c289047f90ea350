"""Tests of the systems that the benchmark compares: what it does where packages are missing.

The programs `node` and `npm` are stubs: shell scripts in a folder of their own.
"""
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from tests import peers
from tests.peers import Absent

NODE = 'echo "$1 listening at http://localhost:3001"; exec sleep 60'
HANGS = """if True:
    import pathlib, subprocess, sys, time
    if sys.argv[2:]:
        subprocess.Popen([sys.executable, "-c", *sys.argv[2:]])
    time.sleep(60)
    pathlib.Path(sys.argv[1]).touch()
"""


class ExpressTest(unittest.TestCase):
    def setUp(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.tools, self.seed = folder / "tools", folder / "seed"
        for made in (self.tools, self.seed):
            made.mkdir()
        for name in peers.DEMO:
            (self.seed / f"{name}.js").write_text("")
        self.enterContext(mock.patch.dict(os.environ, PATH=str(self.tools)))

    def install(self, tool: str, script: str) -> None:
        path = self.tools / tool
        path.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
        path.chmod(0o755)

    def reason(self) -> str:
        """Return why there is no Express demo."""
        with self.assertRaises(Absent) as caught, peers.express(self.seed):
            pass
        return str(caught.exception)

    def test_a_machine_without_node_or_the_demo_is_said_to_lack_it(self):
        self.assertEqual(self.reason(), "node and npm not found")
        self.install("node", NODE)
        self.assertEqual(self.reason(), "npm not found")
        self.install("npm", "exit 0")
        (self.seed / "orders.js").unlink()
        self.assertEqual(self.reason(), f"orders.js not found in {self.seed} (see --seed)")

    def test_packages_are_installed_into_a_copy_and_never_into_the_folder_given(self):
        self.install("node", f"test -d node_modules && {NODE}")
        self.install("npm", "mkdir node_modules")
        self.seed.chmod(0o500)  # such a folder can be copied, too
        with peers.express(self.seed) as ports:
            self.assertEqual(ports, {"users": 3001, "gateway": 3001})
        self.assertEqual(
            {path.name for path in self.seed.iterdir()}, {f"{name}.js" for name in peers.DEMO},
            "the benchmark must not change the folder of the demo")

    def test_the_reason_is_one_line_if_a_package_or_a_server_fails(self):
        self.install("node", "echo; echo 'Error: listen EADDRINUSE'; echo '    at Server'; exit 1")
        self.install("npm", "echo warn; echo 'npm error code ENOTFOUND'; echo more; exit 1")
        self.assertEqual(self.reason(), "npm install failed: npm error code ENOTFOUND")
        (self.seed / "node_modules").mkdir()
        self.assertEqual(self.reason(), "users.js did not start: Error: listen EADDRINUSE")


class PrepareTest(unittest.TestCase):
    @mock.patch.object(peers, "PACKAGE_TIME", 0.5)
    def test_a_command_that_hangs_is_ended_with_all_that_it_started(self):
        with tempfile.TemporaryDirectory() as folder:
            finished = Path(folder, "finished")
            command = [sys.executable, "-c", HANGS, str(finished)]
            with self.assertRaisesRegex(Absent, "the installer takes longer than 0.5 s"):
                peers.prepare("the installer", [*command, *command[2:]])
            self.assertFalse(finished.exists(), "a process that the installer started went on")


if __name__ == "__main__":
    unittest.main()
