"""Settings, given from outside the code (*externalized configuration*), so that the same code runs
on a laptop and in production.

A flag wins over its environment variable, which wins over the default: `--data` and MICROSHOP_DATA
are one setting. A bad value ends the process with one line that names it, and exit status 2.

Law: settings are read once, in main(). Apart from this module, only run_all.py looks at the
environment: it passes it on to its children, and looks for NO_COLOR and TERM.
"""
import argparse
import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from microshop.chassis.admission import Rate

SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
TOKEN_TEXT = re.compile(r"[0-9A-Za-z._~+/-]+=*")  # RFC 6750 section 2.1
TOKEN_RULE = "only letters, digits and -._~+/, optionally followed by ="
LABEL = "[0-9A-Za-z_-]{1,63}"  # of a host name
BASE_URL = re.compile(
    rf"http://(?:{LABEL}(?:\.{LABEL})*|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{{1,5}}))?")
SWITCH = {"1": True, "true": True, "yes": True, "on": True,
          "0": False, "false": False, "no": False, "off": False, "": False}


class Setting(NamedTuple):
    """A setting. `parse` turns its text into a value, or raises ValueError to say what is wrong.

    Without a default, the value is None if the setting is not given. A `secret` is never printed
    and has no flag, because every user of the machine can see the flags of a process.
    """

    name: str
    parse: Callable[[str], Any]
    default: str | None
    help: str
    secret: bool = False


# --- parsers: each turns a text into a value, or raises a ValueError that quotes the text

def port(text: str) -> int:
    if text.startswith("tcp://"):
        raise ValueError(
            f"{text!r} is not a port: Kubernetes sets MICROSHOP_PORT to that for a Service called "
            "microshop; set enableServiceLinks: false in the pod, or rename the Service")
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,4}", text):
        raise ValueError(f"{text!r} is not a count (1 to 99999)")
    return int(text)


def seconds(text: str) -> float:
    if not SECONDS.fullmatch(text) or float(text) == 0:
        raise ValueError(f"{text!r} is not a number of seconds, like 5 or 0.5")
    return float(text)


def rate(text: str) -> Rate:
    match = re.fullmatch("([1-9][0-9]{0,5})/([smh])", text)
    if not match:
        raise ValueError(f"{text!r} is not a rate, like 100/s, 600/m or 5000/h")
    requests, unit = match.groups()
    return Rate(int(requests), {"s": 1, "m": 60, "h": 3600}[unit])


def token(text: str) -> str:
    if not TOKEN_TEXT.fullmatch(text):  # the text is secret: the message must not quote it
        raise ValueError(f"the variable does not contain a valid token ({TOKEN_RULE})")
    return text


def token_file(path: str) -> str:
    """Return the token that a file contains."""
    try:
        text = Path(path).read_text("latin-1").strip()
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error.strerror}") from None
    if not TOKEN_TEXT.fullmatch(text):
        raise ValueError(f"{path!r} does not contain a valid token ({TOKEN_RULE})")
    return text


def host(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z.:_-]+", text):
        raise ValueError(f"{text!r} is not a host name or address")
    return text


def switch(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ValueError(f"{text!r} is neither 1 nor 0")
    return SWITCH[text.lower()]


def folder(text: str) -> Path:
    """Return the path of a folder, which may be missing."""
    if not text:
        raise ValueError(f"{text!r} is not a folder")
    try:
        os.scandir(text).close()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ValueError(f"{text!r} is not a folder that can be used: {error.strerror}") from None
    return Path(text)


def base_urls(text: str) -> list[str]:
    """Return the base URLs in a comma-separated list: the instances of one service."""
    urls = [url.strip().removesuffix("/") for url in text.split(",")]
    if not all(map(is_base_url, urls)):
        raise ValueError(f"{text!r} is not a base URL like http://localhost:3001, "
                         "or a comma-separated list of them")
    return urls


def is_base_url(url: str) -> bool:
    match = BASE_URL.fullmatch(url)
    if not match or not 1 <= int(match["port"] or 80) <= 65535:
        return False
    try:
        ipaddress.IPv6Address(match["ipv6"] or "::")  # "::" stands in if the host is no IPv6
    except ValueError:
        return False
    return True


def supervision(text: str) -> list[int]:
    """Return the three numbers that run_all passes on.

    They are the file descriptors of the listener and of the heartbeat, and how many processes were
    started before in the same role.
    """
    if not re.fullmatch("[0-9]{1,9},[0-9]{1,9},[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is not two file descriptors and a count")
    return [int(number) for number in text.split(",")]


# --- settings that several processes have

HOST = Setting("host", host, "127.0.0.1", "address to listen on")
DATA = Setting("data", folder, "data", "folder of the database files")
TIMEOUT = Setting("timeout", seconds, "5", "seconds that a request may take")
QUIET = Setting("quiet", switch, "", "write no access log")
TOKEN = Setting("token", token, None, "token that every write needs", secret=True)
TOKEN_FILE = Setting(
    "token-file", token_file, None,
    "file with the token that every write needs (or set MICROSHOP_TOKEN to the token)")

SHARED = [  # every process has these; run_all passes them on to each of its children
    Setting("max-connections", count, "1024", "open connections that each process may have"),
    Setting("grace", seconds, "10", "seconds to finish open requests when a process has to stop"),
]
SUPERVISED = Setting("supervised", supervision, None,
                     "for run_all only: the sockets that it passes on, and the count of restarts")
FOR_GATEWAY = [  # the gateway has these; run_all passes them on to it
    TIMEOUT,
    TOKEN_FILE,
    Setting("rate", rate, None,
            "requests that one client may send, like 100/s (default: no limit)"),
    Setting("max-in-flight", count, "64", "concurrent requests to each service"),
]


def own_port(number: int) -> Setting:
    return Setting("port", port, str(number), "port to listen on; 0 takes a free one")


def service_url(name: str, port: int) -> Setting:
    """Return the setting that says where a service, or the gateway, is.

    This is *service discovery* at its simplest: each process gets the addresses of the services
    that it calls as configuration. Larger systems ask a registry or DNS.
    """
    return Setting(
        f"{name}-url", base_urls, f"http://127.0.0.1:{port}",
        f"base URL of the {name} service, or a comma-separated list, one for each instance")


# --- reading them

def read(program: str, settings: Sequence[Setting],
         check: Callable[[argparse.Namespace], None] | None = None,
         arguments: list[str] | None = None, purpose: str = "") -> argparse.Namespace:
    """Return the settings by name, and in `flags` the texts of those that were given as flags.

    `check` may look at all values together; it raises ValueError if they contradict each other.
    `purpose` says for --help what the program does.
    Prints one line and exits with status 2 if a value is bad.
    """
    parser = _make_parser(program, settings, purpose)
    flags = {name: text for name, text in vars(parser.parse_args(arguments)).items()
             if text is not None}
    values = argparse.Namespace(flags=flags)
    for setting in settings:
        source, text = _find_text(setting, flags)
        try:
            value = None if text is None else setting.parse(text)
        except ValueError as reason:
            parser.error(f"{source}: {reason}")
        setattr(values, setting.name.replace("-", "_"), value)
    try:
        if check:
            check(values)
    except ValueError as reason:
        parser.error(str(reason))
    return values


def variable(name: str) -> str:
    """Return the environment variable of the setting with this name."""
    return "MICROSHOP_" + name.replace("-", "_").upper()


def find_token(values: argparse.Namespace) -> str:
    """Return the token that TOKEN_FILE or TOKEN gives (the file wins), or "" if neither does."""
    return values.token_file or values.token or ""


def as_flags(values: argparse.Namespace, settings: Sequence[Setting]) -> list[str]:
    """Return flags for another process: those of the settings that were given to us as flags.

    The others need not be passed on: a child process inherits the environment.
    """
    return [f"--{setting.name}={values.flags[setting.name]}"
            for setting in settings if setting.name in values.flags]


def _find_text(setting: Setting, flags: dict[str, str]) -> tuple[str, str | None]:
    """Return where a setting comes from (for messages) and its text, or None if it is not given.

    An empty environment variable means the default. If there is no default, the empty text is
    parsed, and so refused: if MICROSHOP_TOKEN is set but empty, not to start is better than to
    start without a token.
    """
    if setting.name in flags:
        return f"--{setting.name}", flags[setting.name]
    name = variable(setting.name)
    text = os.environ.get(name)
    if not text and setting.default is not None:
        text = setting.default
    return name, text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line, without the usage that argparse would print before it."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _make_parser(program: str, settings: Sequence[Setting], purpose: str) -> _Parser:
    example = settings[0].name
    parser = _Parser(
        prog=f"python -m {program}", allow_abbrev=False,
        description=f"{purpose} Each flag can also be set in the environment, --{example} as "
                    f"MICROSHOP_{example.upper()}. The flag wins.")
    for setting in settings:
        if setting.secret:
            continue
        options: dict[str, Any] = {"dest": setting.name, "help": setting.help}
        if setting.default:
            options["help"] += f" (default: {setting.default})"
        if setting.parse is switch:
            options |= {"action": "store_const", "const": "1"}
        parser.add_argument(f"--{setting.name}", **options)
    return parser
