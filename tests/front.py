"""The shop on a server, as the README sets it up: a unit of systemd, and nginx in front.

`make conformance` uses this.

The blocks of the README are used as they are, apart from ports, folders and the rate. systemd
itself does not run: we run the command that its unit has.
"""
import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from microshop import GATEWAY_PORT
from tests.helpers import TOP, process, wait_until
from tests.observing import RealShop

SBIN = "/usr/sbin"  # where nginx is; it may be missing in the PATH of a user who is not root
NGINX = """
user {user};
daemon off;
pid nginx.pid;
error_log errors.log warn;
events {{}}
http {{
    access_log off;
    {folders}
    {server}
}}
"""
FOLDERS = " ".join(f"{name}_temp_path {name};"  # else they are in folders that only root can use
                   for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def block(language: str) -> str:
    """Return the only block in the README that is in a language."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", (TOP / "README.md").read_text())
    assert len(blocks) == 1, f"the README has {len(blocks)} blocks ```{language}, not one"
    return blocks[0]


def replaced(text: str, changes: dict[str, str]) -> str:
    """Replace what must be in a text."""
    for old, new in changes.items():
        assert old in text, f"the README's block does not contain {old!r}:\n{text}"
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def shop_of_unit(token: str) -> Iterator[RealShop]:
    """Run the shop with the flags in the unit, but with free ports and temporary folders."""
    with tempfile.TemporaryDirectory(prefix="microshop-front-") as folder:
        Path(folder, "token").write_text(token)
        flags = re.findall(r"(?m)^ExecStart=\S+ -m (.*)$", block("ini"))
        assert len(flags) == 1, f"the unit must have one ExecStart= with python -m, not {flags}"
        arguments = replaced(flags[0], {"%d": folder, "/var/lib": folder}).split()
        with process(*arguments, "--port=0") as run_all:
            yield RealShop(run_all)
            status = run_all.stop(signal.SIGTERM)
            assert status == 0, f"on SIGTERM, the shop ended with status {status}"


@contextlib.contextmanager
def nginx(gateway: int, rate: str) -> Iterator[int]:
    """Run nginx in front of a gateway, with a rate like "100r/s"; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # free again when nginx takes it
    server = replaced(block("nginx"), {
        "listen 80;": f"listen 127.0.0.1:{port};", "rate=100r/s": f"rate={rate}",
        f"127.0.0.1:{GATEWAY_PORT};": f"127.0.0.1:{gateway};"})
    with tempfile.TemporaryDirectory(prefix="microshop-front-") as folder:
        configuration = Path(folder, "nginx.conf")
        configuration.write_text(
            NGINX.format(user=getpass.getuser(), folders=FOLDERS, server=server))
        output = Path(folder, "output")
        with output.open("w") as file:
            child = subprocess.Popen([find_tool("nginx"), "-p", folder, "-c", configuration],
                                     stdout=file, stderr=file, start_new_session=True)
        try:
            wait_until(lambda: child.poll() is not None or is_listening(port), "nginx to listen")
            assert child.poll() is None, f"nginx did not start:\n{output.read_text()}"
            yield port
        finally:
            child.terminate()
            child.wait()


def is_listening(port: int) -> bool:
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
