"""Adding a service takes its module, a line in SERVICES, its tests, its contract, a line in README.

Here a copy of the project gets a fourth service, made from the users service by renaming.
"""
import ast
import contextlib
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path

from microshop import SERVICES
from tests.helpers import Process, ask, wait_until
from tests.source import copy_project

# As long as "users", so that renaming makes no line wider.
NAME = next(name for name in ("notes", "carts", "gifts") if name not in SERVICES)
PORT = max(SERVICES.values()) + 1
LAW = "tests.test_laws.ServiceLawTest"
PARTS = {  # of the new service: the file of users that it is made from
    f"microshop/{NAME}.py": "microshop/users.py",
    f"tests/test_{NAME}.py": "tests/test_users.py",
    f"tests/contracts/gateway-{NAME}.json": "tests/contracts/gateway-users.json"}


def renamed(text: str) -> str:
    """Return a text about users as one about the new service, like Users -> Notes."""
    for old, new in (("users", NAME), ("Users", NAME.capitalize()), ("user", NAME[:-1]),
                     ("User", NAME[:-1].capitalize())):
        text = text.replace(old, new)
    return text


def add_line_in_services(top: Path) -> None:
    path = top / "microshop" / "__init__.py"
    source = path.read_text()
    [found] = [node.value for node in ast.parse(source).body
               if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)]
    old = ast.get_source_segment(source, found)
    new = re.sub(r",?\s*\}$", f',\n    "{NAME}": {PORT},\n}}', old)
    path.write_text(source.replace(old, new))


def add_part(top: Path, part: str) -> None:
    (top / part).write_text(renamed((top / PARTS[part]).read_text()))


def add_line_in_readme(top: Path) -> None:
    with (top / "README.md").open("a") as readme:
        readme.write(f"\nThe {NAME} service listens at `localhost:{PORT}`.\n")


def add_service(top: Path) -> None:
    """Add the whole service to a copy of the project."""
    add_line_in_services(top)
    for part in PARTS:
        add_part(top, part)
    add_line_in_readme(top)


@contextlib.contextmanager
def copied_project() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        copy_project(Path(name))
        yield Path(name)


class NewServiceTest(unittest.TestCase):
    def run_law(self, top: Path) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-B", "-m", "unittest", LAW], cwd=top,
                              capture_output=True, text=True)
        return done.returncode, done.stderr

    def test_the_law_says_in_a_sentence_each_what_a_new_service_lacks(self):
        with copied_project() as top:
            add_line_in_services(top)
            status, printed = self.run_law(top)
            self.assertEqual(status, 1, printed)
            for missing in (*PARTS, "README.md"):
                sentences = re.findall(rf"(?m)^microshop.SERVICES names '{NAME}', but .*$", printed)
                self.assertEqual(sum(missing in sentence for sentence in sentences), 1,
                                 f"sentences that name {missing} in:\n{printed}")
            for part in PARTS:
                add_part(top, part)
            add_line_in_readme(top)
            self.assertEqual(self.run_law(top)[0], 0, printed)

    def test_the_law_finds_a_module_without_a_service_of_that_name(self):
        with copied_project() as top:
            add_service(top)
            module = top / "microshop" / f"{NAME}.py"
            module.write_text(module.read_text().replace(f'"{NAME}"', '"other"', 1))
            self.assertRegex(self.run_law(top)[1], f"{NAME}.py has no subclass of Service")

    def test_gateway_and_live_of_a_shop_with_one_more_line_and_module_know_the_new_service(self):
        with copied_project() as top:
            add_line_in_services(top)
            add_part(top, f"microshop/{NAME}.py")
            with contextlib.closing(Process("microshop.run_all", "--fresh", "--port", "0",
                                            folder=top, TMPDIR=str(top))) as shop:
                shop.wait_for("ready in")
                gateway = shop.port("API Gateway")
                answer = ask(gateway, "GET", f"/{NAME}")
                self.assertEqual((answer.status, answer.json[0]), (200, {"id": 1, "name": "Alice"}))
                published = ask(gateway, "GET", "/openapi.json").json["paths"]
                self.assertLessEqual({f"/{NAME}", f"/{NAME}/{{id}}"}, published.keys())
                every_service_is_ok = dict.fromkeys([*SERVICES, NAME], "ok")
                wait_until(lambda: ask(gateway, "GET", "/health").json["services"]
                           == every_service_is_ok, "the gateway to find all four healthy")
                live = shop.port("Live picture")
                picture = ask(live, "GET", "/picture").json
        self.assertEqual({node["name"]: node["state"] for node in picture["nodes"]},
                         dict.fromkeys(["gateway", *SERVICES, NAME], "up"), "the nodes of live")
        self.assertIn(("gateway", NAME),
                      [(edge["from"], edge["to"]) for edge in picture["edges"]])


if __name__ == "__main__":
    unittest.main()
