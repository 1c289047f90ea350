"""Several hosts on this machine, with addresses of their own: network namespaces of Linux.

                     clients 10.0.0.1
                        |
    +---------------------------------------+
    |                switch                 |
    +---------------------------------------+
        |          |          |          |       links that can be cut
     gateway     users    products    orders
    10.0.0.2   10.0.0.3   10.0.0.4   10.0.0.5

Nothing of it, names and switch included, can be seen outside of these namespaces. The kernel
removes them when no process is left in them, and it kills their processes when the process ends
that has started them: so even a run that is killed leaves nothing behind.

    python -m tests.hosts ADDRESS PORT    a relay; only Hosts.way_to() can start it
"""
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from tests.helpers import TOP, Process
from tests.peers import Absent

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")  # Debian: iproute2, util-linux, mount
NETWORK = "10.0.0."
# A user who is not root gets the right to make networks only in a namespace of users as well.
MAP_USER, JOIN_USER = ([], []) if os.geteuid() == 0 else (
    ["--map-root-user"], ["--user", "--preserve-credentials"])

# The names of namespaces are files in /run/netns: this /run is seen by these processes alone.
MAKE_SWITCH = f"""
set -e
mount -t tmpfs hosts /run
ip link add switch type bridge
ip address add {NETWORK}1/24 dev switch
ip link set switch up
"""
MAKE_HOST = """
ip netns add {name}
ip link add {name} type veth peer name eth0 netns {name}
ip link set {name} master switch up
ip -n {name} address add {address}/24 dev eth0
ip -n {name} link set eth0 up
ip -n {name} link set lo up
"""
HOLD = "echo made; exec sleep infinity"


class Hosts(contextlib.ExitStack):
    """Hosts with these names, joined by a switch. Raises Absent if they cannot be made here."""

    def __init__(self, *names: str):
        super().__init__()
        if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
            raise Absent(f"{', '.join(missing)} not found")
        self.started: list[subprocess.Popen] = []  # the switch and the relays
        self.addresses = {name: f"{NETWORK}{number}" for number, name in enumerate(names, start=2)}
        hosts = [MAKE_HOST.format(name=name, address=address)
                 for name, address in self.addresses.items()]
        self.switch = self.start([
            "unshare", *MAP_USER, "--net", "--mount", *mortal(),
            "sh", "-c", "".join([MAKE_SWITCH, *hosts, HOLD])])
        if (said := self.switch.stdout.readline().strip()) != b"made":
            self.close()
            raise Absent(f"this user cannot make network namespaces: {said.decode()}")

    def start(self, command: list[str], stdin: int | socket.socket = subprocess.DEVNULL
              ) -> subprocess.Popen:
        """Start a command that is killed when we close."""
        popen = subprocess.Popen(command, cwd=TOP, stdin=stdin, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, start_new_session=True)
        self.started.append(popen)
        self.enter_context(popen)  # it waits for the end, and closes the pipe
        self.callback(popen.kill)
        return popen

    def inside(self, net: str) -> list[str]:
        """Return the words before a command that run it in a network namespace.

        `net` is its file, as seen by the switch: ns/net is the switch's own.
        """
        holder = f"/proc/{self.switch.pid}"
        return ["nsenter", "--target", str(self.switch.pid), *JOIN_USER, f"--net={holder}/{net}"]

    def run(self, host: str, *arguments: str, **environment: str) -> Process:
        """Run `python -m ...` on a host."""
        process = Process(*arguments, **environment,
                          within=[*self.inside(f"root/run/netns/{host}"), *mortal()])
        self.callback(process.close)
        self.callback(process.popen.kill)  # first, since a test may have stopped it
        return process

    def way_to(self, host: str, port: int) -> int:
        """Return a port of 127.0.0.1 that leads to a port of a host, as a client reaches it.

        The relay inherits a socket that listens out here, and connects to the host from in there.
        """
        with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
            self.start([*self.inside("ns/net"), *mortal(), sys.executable, "-m", "tests.hosts",
                        self.addresses[host], str(port)], listener)
            return listener.getsockname()[1]

    def cut(self, *hosts: str) -> None:
        """Cut the link of one host; or cut two hosts off from each other, but not from others."""
        self.set_links(hosts, "down", "isolated on")

    def join(self, *hosts: str) -> None:
        """Undo cut()."""
        self.set_links(hosts, "up", "isolated off")

    def set_links(self, hosts: Sequence[str], link: str, port_of_switch: str) -> None:
        state = [link] if len(hosts) == 1 else ["type", "bridge_slave", *port_of_switch.split()]
        for host in hosts:
            subprocess.run([*self.inside("ns/net"), "ip", "link", "set", "dev", host, *state],
                           check=True)


def mortal() -> list[str]:
    """Return the words that run the command after them until this process ends.

    Then the kernel kills it. If this process has ended even before, the command is not run.
    """
    return ["setpriv", "--pdeathsig", "KILL",
            "sh", "-c", f'test $PPID = {os.getpid()} && exec "$@"', "sh"]


def relay(client: socket.socket, target: tuple[str, int]) -> None:
    """Pass bytes on in both directions, until both ends have closed."""
    with contextlib.suppress(OSError), client, socket.create_connection(target) as server:
        back = threading.Thread(target=pass_on, args=(server, client), daemon=True)
        back.start()
        pass_on(client, server)
        back.join()


def pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def main() -> None:
    """Relay each connection that the listener on stdin accepts."""
    address, port = sys.argv[1:]
    listener = socket.socket(fileno=0)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=relay, args=(client, (address, int(port))), daemon=True).start()


if __name__ == "__main__":
    main()
