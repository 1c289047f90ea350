"""The supervisor script: which processes make up the shop, and on which ports.

The gateway listens on `--port`, each service on one of the next ports, and live on the one after
them. This script opens all ports itself before it starts a process, and passes the listening
sockets on. How processes are kept running is the subject of chassis/child.py and
chassis/supervisor.py.
"""
import contextlib
import errno
import os
import shlex
import socket
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from microshop import GATEWAY_PORT, SERVICES
from microshop.chassis import config, surroundings
from microshop.chassis.child import Child
from microshop.chassis.console import Console
from microshop.chassis.data_folder import FolderUnusable, claim
from microshop.chassis.supervisor import Supervisor

SERVICE_HOST = "127.0.0.1"
DRAIN_SHARE = 0.7  # of the grace period is for requests in flight, the rest for closing down

OPTIONS = [
    config.Setting("host", config.host, "127.0.0.1",
                   f"address of the gateway; the services stay on {SERVICE_HOST}"),
    config.Setting("port", config.port, str(GATEWAY_PORT),
                   "port of the gateway; the services and live get the next ones; "
                   "0 chooses free ports"),
    config.DATA,
    config.Setting("fresh", config.switch, "",
                   "use a temporary data folder instead of --data, and delete it at the end"),
    config.Setting("workers", config.count, "1",
                   "number of gateway processes; they share the port"),
    config.Setting("no-live", config.switch, "", "leave out the live picture"),
    *config.FOR_GATEWAY,
    *config.SHARED,
    config.QUIET,
]


def open_listener(name: str, host: str, port: int) -> socket.socket:
    """Return a socket that listens for a child. Exits with status 1 if that is not possible."""
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            without = " (or --no-live: the shop works without it)" if name == "live" else ""
            sys.exit(f"run_all: port {port} on {host}, which {name} needs, is already in use; "
                     f"stop the process that uses it, or choose another --port{without}")
        sys.exit(f"run_all: {name} cannot listen on port {port} of {host}: {error.strerror}")
    return listener


def names_behind(settings: Namespace) -> list[str]:
    """Return the names of the processes that get the ports after the gateway's, in order."""
    return [*SERVICES] if settings.no_live else [*SERVICES, "live"]


def open_listeners(settings: Namespace) -> dict[str, socket.socket]:
    """Return a listening socket for the gateway, for each service and for live, by name."""
    listeners = {"gateway": open_listener("gateway", settings.host, settings.port)}
    for number, name in enumerate(names_behind(settings), start=1):
        port = settings.port + number if settings.port else 0
        listeners[name] = open_listener(name, SERVICE_HOST, port)
    return listeners


def plan_environment(listeners: dict[str, socket.socket]) -> dict[str, str]:
    """Return a copy of our environment, and add the URL of each process if it is not set there."""
    environment = dict(os.environ)
    for name in ("gateway", *SERVICES):
        variable = config.variable(f"{name}-url")
        if not environment.get(variable):  # an empty one counts as not set
            environment[variable] = local_url(listeners[name])
    return environment


def local_url(listener: socket.socket) -> str:
    """Return the base URL at which a process on this machine reaches a listener."""
    host, port, *_ = listener.getsockname()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # it listens on every address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def plan_children(settings: Namespace) -> tuple[list[Child], list[Child]]:
    """Return the services, with live, and the gateways that the settings ask for."""
    listeners = open_listeners(settings)
    environment = plan_environment(listeners)
    without_token = environment.copy()
    for name in ("MICROSHOP_TOKEN", "MICROSHOP_TOKEN_FILE"):  # only the gateway checks it
        without_token.pop(name, None)

    # The children get a shorter grace period than ours.
    shared = [setting for setting in config.SHARED if setting.name != "grace"]
    flags = [f"--grace={settings.grace * DRAIN_SHARE:f}", *config.as_flags(settings, shared)]
    if settings.quiet:
        flags.append("--quiet")
    timeout = config.as_flags(settings, [config.TIMEOUT])
    service_flags = [f"--data={settings.data}", *timeout, *flags]
    gateway_flags = [*flags, *config.as_flags(settings, config.FOR_GATEWAY)]

    services = [Child(name, f"microshop.{name}", listeners[name], service_flags, without_token)
                for name in SERVICES]
    if not settings.no_live:  # quiet, since the page asks every second
        services.append(Child("live", "microshop.live", listeners["live"], [*flags, "--quiet"],
                              without_token, is_optional=True))
    gateway_names = ["gateway", *(f"gateway{n}" for n in range(2, settings.workers + 1))]
    gateways = [Child(name, "microshop.gateway", listeners["gateway"], gateway_flags, environment)
                for name in gateway_names]
    return services, gateways


def check(settings: Namespace) -> None:
    """Raise ValueError if settings contradict each other, or leave too few ports."""
    if settings.fresh and "data" in settings.flags:
        raise ValueError("--fresh and --data contradict each other; choose one")
    needed = len(names_behind(settings))
    if settings.port + needed > 65535:
        raise ValueError(f"--port: {settings.port} leaves no room for the {needed} ports "
                         "above it that the other processes need")


def make_temporary_folder() -> tempfile.TemporaryDirectory:
    """Return a new folder that ends with the shop. Exits with status 1 if that is not possible."""
    try:
        return tempfile.TemporaryDirectory(prefix="microshop-")
    except OSError as error:
        sys.exit(f"run_all: cannot make a temporary folder for --fresh: {error.strerror}")


def run_shop() -> int:
    """Read the settings and run the shop; return its exit status."""
    settings = config.read("microshop.run_all", OPTIONS, check, purpose=(
        "Start the shop and keep it running, until Ctrl-C or SIGTERM."))
    with contextlib.ExitStack() as stack:
        if settings.fresh:
            folder = stack.enter_context(make_temporary_folder())
            settings.data = Path(folder)
        services, gateways = plan_children(settings)
        names = [child.name for child in services + gateways]
        wants_colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        try:
            claim(settings.data, shared=False)  # until the process ends
            console = Console("run_all", names, wants_colours)
        except (FolderUnusable, RuntimeError) as error:  # or the system has no room for a thread
            sys.exit(f"run_all: {error}")
        stack.callback(console.close)
        if settings.fresh:
            audit = f"python -m microshop.audit --data {shlex.quote(folder)}"
            console.say(f"the data is in {folder} until the shop stops; to audit it: {audit}")
        else:
            console.say(f"the data is in {settings.data}")
        return Supervisor([services, gateways], settings.grace, console).run()


def main() -> None:
    """Run the shop, and exit with its status."""
    surroundings.prepare()
    sys.exit(run_shop())


if __name__ == "__main__":
    main()
