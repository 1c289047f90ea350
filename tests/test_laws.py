"""The laws of the house, checked on its source. Each failure says in a sentence what to change."""
import ast
import importlib
import re
import subprocess
import sys
import unittest
from collections.abc import Iterator

from microshop import GATEWAY_PORT, LIVE_PORT, SERVICES
from microshop.chassis.server import Service
from tests.helpers import TOP
from tests.source import (
    HOUSE, PATTERN_FILES, SERVICE_FILES, SOURCES, imported, module_of, size_of_layers, strings)

WIDTH = 100                # columns
CLASS_LINES = 150
FUNCTION_LINES = 40
PATTERN_CODE_LINES = 300 * len(SERVICES)  # the services and the gateway

SQL = re.compile(
    r"(?i)\b(SELECT .* FROM|INSERT (OR|INTO)|REPLACE INTO|UPDATE \w+ SET|DELETE FROM"
    r"|(CREATE|DROP|ALTER) TABLE)\b", re.S)
SQL_SECTIONS = re.compile("schema|queries")
WRITES_TO_SOCKET = re.compile(
    r"\.(send|sendall|sendto|sendmsg|sendfile|send_response|send_header|end_headers)\b|wfile\b")
WRITERS_TO_SOCKETS = {
    "chassis/wire.py", "chassis/server.py", "chassis/listener.py", "chassis/handler.py",
    "chassis/connections.py", "chassis/child.py"}
READERS_OF_FILES = ("audit.py", "tour/stage.py")  # of those of all services
READERS_OF_THE_ENVIRONMENT = {"run_all.py", "chassis/config.py", "tour/own_shop.py"}
WORDS_OF_THE_SHOP = "|".join([*SERVICES, *(name.removesuffix("s") for name in SERVICES)])

IMPORT_AND_WATCH = """if True:
    import importlib, os, sys, threading
    # What these modules of the standard library do while they are imported is their own affair.
    import argparse, http.server, queue, sqlite3, subprocess, tempfile, urllib.request

    FORBIDDEN = ("os.putenv", "os.system", "os.fork", "os.posix_spawn", "os.mkdir", "os.remove",
                 "socket.__new__", "socket.bind", "socket.connect", "sqlite3.connect",
                 "subprocess.Popen")

    def watch(event, arguments):
        is_source = event == "open" and str(arguments[0]).endswith((".py", ".pyc"))
        if event in FORBIDDEN or event == "open" and not is_source:
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


class LawTestCase(unittest.TestCase):
    def assert_none(self, problems: Iterator[str]) -> None:
        """Fail with all the problems, one sentence on a line each."""
        if found := list(problems):
            self.fail("\n".join(["", *found]))


class ImportLawTest(LawTestCase):
    def test_only_the_standard_library_is_imported(self):
        known = sys.stdlib_module_names | {"microshop"}
        self.assert_none(
            f"microshop/{name} imports {module}: use the standard library only"
            for name, source in SOURCES.items() for module in imported(source)
            if module.partition(".")[0] not in known)

    def test_a_process_imports_only_the_chassis_and_the_map(self):
        self.assert_none(
            f"microshop/{name} imports {module}: processes share code only through the chassis"
            for name, source in SOURCES.items()
            if name != "__main__.py" and not name.startswith("tour/")
            for module in imported(source)
            if module.startswith("microshop.") and module.split(".")[1].islower()
            and not module.startswith(("microshop.chassis", "microshop.watching")))

    def test_only_live_and_the_tour_import_what_the_live_picture_is_made_of(self):
        self.assert_none(
            f"microshop/{name} imports {module}: the shop must work without it"
            for name, source in SOURCES.items()
            if name != "live.py" and not name.startswith(("watching/", "tour/"))
            for module in imported(source) if module.startswith("microshop.watching"))

    def test_no_module_outside_the_tour_imports_the_tour(self):
        self.assert_none(
            f"microshop/{name} imports {module}: the shop must work without the tour"
            for name, source in SOURCES.items() if not name.startswith("tour/")
            for module in imported(source) if module.startswith("microshop.tour"))

    def test_another_name_for_run_all_imports_only_that(self):
        found = {module for module in imported(SOURCES.get("__main__.py", ""))
                 if module.startswith("microshop.")}
        self.assertLessEqual(found, {"microshop.run_all", "microshop.run_all.main"},
                             "microshop/__main__.py is only another name for run_all")

    def test_imports_form_no_cycle(self):
        modules = {module_of(name) for name in SOURCES}
        arrows = {module_of(name): modules & imported(source) - {module_of(name)}
                  for name, source in SOURCES.items()}
        without_cycle: set[str] = set()
        while ready := {module for module, needed in arrows.items()
                        if module not in without_cycle and needed <= without_cycle}:
            without_cycle |= ready
        self.assert_none(
            f"{module} is part of an import cycle, or imports one: it needs "
            + ", ".join(sorted(needed - without_cycle))
            for module, needed in arrows.items() if module not in without_cycle)

    def test_importing_a_module_starts_opens_and_reads_nothing(self):
        modules = map(module_of, SOURCES)
        modules = [module for module in modules if not module.endswith("__main__")]
        done = subprocess.run([sys.executable, "-B", "-c", IMPORT_AND_WATCH, *modules], cwd=TOP,
                              capture_output=True, text=True)
        self.assertEqual(
            (done.returncode, done.stdout, done.stderr), (0, "", ""),
            "importing a module failed, or did something besides defining names: " + done.stderr)

    def test_no_module_hides_one_of_the_standard_library(self):
        self.assert_none(
            f"microshop/{name} has the name of a standard module: choose another"
            for name in SOURCES
            if name.rpartition("/")[2].removesuffix(".py")
            in sys.stdlib_module_names - {"__init__", "__main__"})

    def test_no_function_imports_and_no_name_is_global(self):
        self.assert_none(
            f"microshop/{name}, line {node.lineno}: {problem}"
            for name, source in SOURCES.items()
            for node, problem in hidden_dependencies(ast.parse(source)))


class RoomLawTest(LawTestCase):
    """What belongs in which module."""

    def test_the_chassis_does_not_know_what_the_shop_sells(self):
        for name, source in SOURCES.items():
            if name.startswith(("chassis/", "watching/")) and name != "chassis/__init__.py":
                code = re.sub(r'""".*?"""|#.*', "", source, flags=re.S)
                with self.subTest(name):
                    found = re.search(rf"(?i)(?<![a-z])({WORDS_OF_THE_SHOP})(?![a-z])", code)
                    found = found or re.search(rf"({WORDS_OF_THE_SHOP})Id", code)
                    self.assertIsNone(found, f"microshop/{name} must not know what the shop sells")

    def test_the_gateway_knows_no_business(self):
        self.assertNotRegex(
            SOURCES["gateway.py"], "(?i)stock|quantity|userId|productId|reservation",
            "microshop/gateway.py knows prefixes and links between resources, not their fields")

    def test_a_service_uses_only_its_own_tables_and_file(self):
        for service, name in SERVICE_FILES.items():
            source = SOURCES[name]
            tables = re.findall(r"(?i)\b(?:FROM|INTO|UPDATE|TABLE|JOIN)\s+([a-z_]+)",
                                "\n".join(strings(source)))
            with self.subTest(service):
                self.assertEqual(set(tables) & set(SERVICES), {service},
                                 f"microshop/{name}: each service uses its own database only")
                self.assertEqual(imported(source) & {"sqlite3", "importlib"}, set(),
                                 f"microshop/{name}: the chassis opens the service's own file")
                for other in SERVICES.keys() - {service}:
                    self.assertIsNone(re.search(rf"\b{other}\.db", source),
                                      f"microshop/{name} names the database of {other}")

    def test_sql_about_rows_appears_only_in_services_and_the_audit(self):
        for name, source in SOURCES.items():
            with self.subTest(name):
                is_allowed = name in {*SERVICE_FILES.values(), *READERS_OF_FILES}
                self.assertEqual(bool(SQL.search(source)), is_allowed,
                                 f"microshop/{name}: SQL belongs in services and the audit")

    def test_sql_of_a_service_appears_only_in_its_schema_and_queries(self):
        self.assert_none(
            f"microshop/{name}, section {section!r}: move its SQL into the queries"
            for name in SERVICE_FILES.values()
            for section, text in sections(SOURCES[name])
            if not SQL_SECTIONS.search(section) and any(map(SQL.search, strings(text))))

    def test_the_audit_and_the_tour_only_read_databases(self):
        for name in READERS_OF_FILES:
            with self.subTest(name):
                source = SOURCES[name]
                for text in strings(source):
                    self.assertNotRegex(
                        text, r"(?i)^\s*(INSERT|UPDATE|DELETE|CREATE|DROP|REPLACE)\b",
                        f"microshop/{name} must not change a database")
                self.assertEqual(source.count("sqlite3.connect("), 1,
                                 f"microshop/{name} opens files in one place")
                modes = [text for text in strings(source) if "mode=" in text]
                self.assertEqual(modes, ["?mode=ro"],
                                 f"microshop/{name} opens files only to read them")

    def test_only_the_chassis_writes_to_sockets(self):
        found = {name for name, source in SOURCES.items() if WRITES_TO_SOCKET.search(source)}
        self.assertEqual(found, WRITERS_TO_SOCKETS,
                         "routes return their answer; only these modules write to sockets")

    def test_only_the_settings_and_the_supervisor_read_the_environment(self):
        self.assert_none(
            f"microshop/{name} reads the environment: make it a setting (chassis/config.py)"
            for name, source in SOURCES.items()
            if re.search(r"\b(environb?|getenvb?)\b", source)
            and name not in READERS_OF_THE_ENVIRONMENT)

    def test_every_main_first_repairs_what_its_process_has_inherited(self):
        self.assert_none(
            f"microshop/{name}: main() must begin with surroundings.prepare()"
            for name, source in SOURCES.items() for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and node.name == "main"
            and "surroundings.prepare()" not in map(ast.unparse, node.body[:2]))

    def test_services_and_ports_are_written_in_the_map_alone(self):
        self.assert_none(
            f"microshop/{name}, line {line}: derive {found} from microshop.SERVICES"
            for name, source in SOURCES.items() if name != "__init__.py"
            for line, found in repeated_facts(ast.parse(source)))

    def test_every_module_begins_with_a_docstring(self):
        self.assert_none(
            f"microshop/{name} must say in its first docstring what belongs in it"
            for name, source in SOURCES.items() if not ast.get_docstring(ast.parse(source)))

    def test_the_top_level_holds_only_what_was_agreed(self):
        tracked = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True)
        top = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
        agreed = {"microshop", "tests", "Makefile", "setup.cfg", "README.md"}
        self.assertLessEqual({name for name in top if not name.startswith(".")}, agreed)


class SizeLawTest(LawTestCase):
    def test_lines_are_not_wider_than_100_columns(self):
        self.assert_none(
            f"{path.relative_to(TOP)}, line {number}: {len(line)} columns, at most {WIDTH} allowed"
            for path in [TOP / "Makefile", TOP / "setup.cfg", TOP / ".ci" / "run",
                         *sorted(HOUSE.rglob("*.py")), *sorted((TOP / "tests").rglob("*.py"))]
            if path.exists()
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > WIDTH)

    def test_prose_of_the_readme_is_not_wider_than_100_columns(self):
        text = re.sub(r"^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"),
                      (TOP / "README.md").read_text(), flags=re.S | re.M)
        self.assert_none(
            f"README.md, line {number}: {len(line)} columns, at most {WIDTH} allowed"
            for number, line in enumerate(text.splitlines(), 1)
            if len(line) > WIDTH and not line.startswith("|"))

    def test_classes_and_functions_are_small(self):
        self.assert_none(
            f"microshop/{name}, line {node.lineno}: {node.name} has {size} lines, "
            f"at most {limit} allowed: split it"
            for name, source in SOURCES.items()
            for node, size, limit in definitions(ast.parse(source)) if size > limit)

    def test_the_pattern_itself_stays_small(self):
        size = size_of_layers()["pattern"]
        self.assertLess(size, PATTERN_CODE_LINES,
                        f"lines of code in {', '.join(sorted(PATTERN_FILES))}")


class PythonLawTest(LawTestCase):
    """What an older Python is told. chassis/test_patterns.py checks the regular expressions."""

    def test_an_older_python_gets_one_line_and_exit_status_2(self):
        for module in ("microshop", "microshop.run_all", "microshop.users", "unittest"):
            code = ("import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); "
                    "sys.argv[1:] = []; "
                    f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")
            done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True,
                                  text=True)
            with self.subTest(f"python3.9 -m {module}"):
                self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
                self.assertRegex(done.stderr, r"\Amicroshop needs Python 3\.11 or newer; .*\n\Z")

    def test_an_older_python_can_read_what_tells_it_so(self):
        for path in (HOUSE / "__init__.py", TOP / "tests" / "__init__.py"):
            tree = ast.parse(path.read_bytes().decode("ascii"), feature_version=(3, 4))
            newer = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
            self.assertEqual(newer, [], f"{path}: an f-string")


class ServiceLawTest(LawTestCase):
    """Adding a service takes these parts, and nothing else."""

    def test_each_service_has_all_its_parts(self):
        self.assert_none(sentence for name in SERVICES for sentence in missing_parts(name))

    def test_services_have_the_ports_after_the_gateways_in_order_as_run_all_gives_them(self):
        expected = range(GATEWAY_PORT + 1, GATEWAY_PORT + 1 + len(SERVICES))
        self.assert_none(
            f"microshop.SERVICES gives {name} port {port}: it must be {own}, the next one in order"
            for own, (name, port) in zip(expected, SERVICES.items(), strict=True) if port != own)


def missing_parts(name: str) -> Iterator[str]:
    """Yield a sentence for each part that a service lacks."""
    named, port = f"microshop.SERVICES names {name!r}, but ", SERVICES[name]
    if not (HOUSE / f"{name}.py").exists():
        yield f"{named}there is no microshop/{name}.py: add the module of that service"
    elif not has_service_class(name):
        yield (f"{named}microshop/{name}.py has no subclass of Service with name = {name!r} "
               f"and port = SERVICES[{name!r}]: add it")
    if not (TOP / "tests" / f"test_{name}.py").exists():
        yield f"{named}there is no tests/test_{name}.py: add its tests (see tests/collection.py)"
    contract = f"tests/contracts/gateway-{name}.json"
    if not (TOP / contract).exists():
        yield f"{named}there is no {contract}: add it (copy and change gateway-users.json)"
    if not re.search(rf"(?m)^.*\b{name}\b.*\b{port}\b", (TOP / "README.md").read_text()):
        yield f"{named}no line of README.md has its name and its port {port}: add one"


def has_service_class(name: str) -> bool:
    module = importlib.import_module(f"microshop.{name}")
    return any(issubclass(value, Service) and (value.name, value.port) == (name, SERVICES[name])
               for value in vars(module).values() if isinstance(value, type))


def hidden_dependencies(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield each import inside a function, and each global statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node, "keep state on an object, not in a global name"
        if isinstance(node, ast.FunctionDef):
            for child in ast.walk(node):
                if isinstance(child, ast.Import | ast.ImportFrom):
                    yield child, f"{node.name} imports: move that to the top of the module"


def sections(source: str) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each section; a line like `# --- queries` begins one."""
    parts = re.split(r"(?m)^# --- (.*)$", source)
    yield "the schema, at the top", parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


def repeated_facts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each port, and of each list of all services."""
    ports = {GATEWAY_PORT, *SERVICES.values(), LIVE_PORT}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            url = re.fullmatch(r"(?:http://\S+:)?([0-9]+)/?", str(node.value))
            if url and int(url[1]) in ports:
                yield node.lineno, f"port {url[1]}"
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            values = node.elts
        elif isinstance(node, ast.Dict):
            values = node.keys
        else:
            continue
        names = {value.value for value in values if isinstance(value, ast.Constant)}
        if names >= SERVICES.keys():
            yield node.lineno, "the names of the services"


def definitions(tree: ast.Module) -> Iterator[tuple[ast.AST, int, int]]:
    """Yield each class and function, with its lines and how many it may have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            yield node, node.end_lineno - node.lineno + 1, limit


if __name__ == "__main__":
    unittest.main()
