"""The laws of the house, read off its source."""
import ast
import re
import subprocess
import sys
import unittest

from tests.helpers import TOP

HOUSE = TOP / "microshop"
SERVICES = ("users", "products", "orders")
SOURCES = {path.relative_to(HOUSE).as_posix(): path.read_text() for path in sorted(HOUSE.rglob("*.py"))}

IMPORT_AND_WATCH = """if True:
    import importlib, os, sys, threading
    import argparse, http.server, queue, sqlite3, subprocess, tempfile, urllib.request  # these may read what they like

    def watch(event, arguments):
        if event in ("os.putenv", "socket.bind", "socket.connect", "sqlite3.connect", "subprocess.Popen"):
            raise SystemExit(f"{event} {arguments}")
        if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
            raise SystemExit(f"{event} {arguments}")

    class Environment(dict):
        def touch(self, *_):
            raise SystemExit("the environment is read")
        __getitem__ = __contains__ = __iter__ = get = items = keys = touch

    os.environ = Environment()
    sys.addaudithook(watch)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    assert threading.active_count() == 1, threading.enumerate()
"""


def imported(source: str) -> set[str]:
    """Return the full names of all modules that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


class LawTest(unittest.TestCase):
    def test_nothing_outside_the_standard_library_is_imported(self):
        for name, source in SOURCES.items():
            for module in imported(source):
                with self.subTest(name, module=module):
                    self.assertIn(module.partition(".")[0], sys.stdlib_module_names | {"microshop"})

    def test_processes_import_the_chassis_alone_and_the_chassis_no_process(self):
        for name, source in SOURCES.items():
            for module in imported(source) if name != "__main__.py" else ():  # it is run_all by another name
                with self.subTest(name, module=module):
                    if module.startswith("microshop.") and module.split(".")[1].islower():
                        self.assertTrue(module.startswith("microshop.chassis"))

    def test_the_chassis_does_not_know_what_the_shop_sells(self):
        for name, source in SOURCES.items():
            if name.startswith("chassis/") and name != "chassis/__init__.py":
                code = re.sub(r'""".*?"""|#.*', "", source, flags=re.S)
                with self.subTest(name):
                    self.assertNotRegex(code, r"(?i)\b(user|product|order)s?\b(?! by)")

    def test_the_gateway_knows_no_business(self):
        self.assertNotRegex(SOURCES["gateway.py"], "(?i)stock|quantity|userId|productId|reservation")

    def test_a_service_names_only_its_own_data_and_tables(self):
        for service in SERVICES:
            tables = set(re.findall(r"\b(?:FROM|INTO|UPDATE|TABLE|JOIN)\s+([a-z_]+)", SOURCES[f"{service}.py"]))
            with self.subTest(service):
                self.assertEqual(tables & set(SERVICES), {service})
                for other in SERVICES:
                    self.assertNotIn(f"{other}.db", SOURCES[f"{service}.py"].replace(f"{service}.db", ""))

    def test_sql_about_rows_stands_in_services_alone(self):
        for name, source in SOURCES.items():
            with self.subTest(name):
                found = re.search(r"\b(SELECT|INSERT|UPDATE|DELETE FROM|CREATE TABLE)\b", source)
                self.assertEqual(bool(found), name.removesuffix(".py") in (*SERVICES, "audit"))

    def test_the_audit_only_reads(self):
        self.assertNotRegex(SOURCES["audit.py"], r"\b(INSERT|UPDATE|DELETE|CREATE|DROP|REPLACE)\b")
        self.assertEqual(SOURCES["audit.py"].count("connect("), 1)
        self.assertIn("?mode=ro", SOURCES["audit.py"])

    def test_only_the_chassis_writes_to_sockets(self):
        for name, source in SOURCES.items():
            with self.subTest(name):
                found = re.search(r"\.(send|sendall|sendto|sendmsg)\(|wfile\.", source)
                self.assertEqual(bool(found), name in (
                    "chassis/wire.py", "chassis/server.py", "chassis/listener.py", "chassis/handler.py", "chassis/connections.py"))

    def test_only_config_and_the_supervisor_look_at_the_environment(self):
        for name, source in SOURCES.items():
            if name not in ("chassis/config.py", "run_all.py"):
                with self.subTest(name):
                    self.assertNotRegex(source, r"os\.environ|getenv")

    def test_importing_does_nothing(self):
        modules = [f"microshop.{name.removesuffix('.py').removesuffix('__init__')}".replace("/", ".").rstrip(".")
                   for name in SOURCES]
        done = subprocess.run([sys.executable, "-B", "-c", IMPORT_AND_WATCH, *modules], cwd=TOP,
                              capture_output=True, text=True, timeout=20)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_the_top_level_is_as_fixed(self):
        tracked = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True)
        if tracked.returncode == 0:  # else this is no checkout but a copy
            top = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
            self.assertLessEqual({name for name in top if not name.startswith(".")},
                                 {"microshop", "tests", "Makefile", "setup.cfg", "README.md"})

    def test_no_module_hides_one_of_the_standard_library(self):
        for name in SOURCES:
            self.assertNotIn(name.rpartition("/")[2].removesuffix(".py"), sys.stdlib_module_names)

    def test_no_function_imports_or_touches_globals(self):
        for name, source in SOURCES.items():
            with self.subTest(name):
                for node in ast.walk(ast.parse(source)):
                    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        inner = [child for child in ast.walk(node) if isinstance(child, (ast.Import, ast.ImportFrom))]
                        self.assertEqual(inner, [], f"{node.name} imports inside a function")
                    self.assertNotIsInstance(node, ast.Global)

    def test_every_module_says_what_it_is(self):
        for name, source in SOURCES.items():
            tree = ast.parse(source)
            with self.subTest(name):
                self.assertTrue(ast.get_docstring(tree))


if __name__ == "__main__":
    unittest.main()
