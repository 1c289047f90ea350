"""Settings: a flag wins over its environment twin, which wins over the default.

`--data` and MICROSHOP_DATA are one setting. Law: read once, in main(); nothing else looks at the
environment but the supervisor, to hand it on. A bad value ends the process with one line that names it, exit status 2.
"""
import argparse
import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from microshop.chassis.admission import Rate

LABEL = "[0-9A-Za-z_-]{1,63}"  # of a host name
SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
SWITCH = {"1": True, "true": True, "yes": True, "on": True,
          "0": False, "false": False, "no": False, "off": False, "": False}


class Setting(NamedTuple):
    """One setting: `parse` turns its text into a value or raises ValueError with the reason.

    Without a default it may be None. One that is `secret` is never shown, and has no flag, since everybody on
    the machine can see those.
    """

    name: str
    parse: Callable[[str], Any]
    default: str | None
    help: str
    secret: bool = False


def port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("is no port (0 to 65535)")
    return int(text)


def count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,4}", text):
        raise ValueError("is no count (1 to 99999)")
    return int(text)


def seconds(text: str) -> float:
    if not SECONDS.fullmatch(text) or float(text) == 0:
        raise ValueError("is no number of seconds like 5 or 0.5")
    return float(text)


def rate(text: str) -> Rate:
    match = re.fullmatch("([1-9][0-9]{0,5})/([smh])", text)
    if not match:
        raise ValueError("is no rate like 100/s, 600/m or 5000/h")
    return Rate(int(match[1]), {"s": 1, "m": 60, "h": 3600}[match[2]])


def token(text: str) -> str:
    if not re.fullmatch("[0-9A-Za-z._~+/-]+=*", text):  # RFC 6750 2.1
        raise ValueError("is no token (letters, digits and -._~+/ alone, perhaps = at the end)")
    return text


def token_file(text: str) -> str:
    """Return the token that stands in a file."""
    try:
        return token(Path(text).read_text("latin-1").strip())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except ValueError as reason:
        raise ValueError(f"holds what {reason}") from None


def host(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z.:_-]+", text):
        raise ValueError("is no host name or address")
    return text


def switch(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ValueError("is neither 1 nor 0")
    return SWITCH[text.lower()]


def base_urls(text: str) -> list[str]:
    """Parse base URLs, comma-separated: the instances of one service."""
    urls = [url.strip().removesuffix("/") for url in text.split(",")]
    for url in urls:
        match = re.fullmatch(rf"http://(?:{LABEL}(?:\.{LABEL})*|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{{1,5}}))?", url)
        if not match or int(match[2] or 80) not in range(1, 65536):
            raise ValueError("is no base URL like http://localhost:3001 (several: comma-separated)")
        ipaddress.IPv6Address(match[1] or "::")  # its ValueError says what is wrong
    return urls


def folder(text: str) -> Path:
    if not text or Path(text).exists() and not Path(text).is_dir():
        raise ValueError("is no folder")
    return Path(text)


def handles(text: str) -> list[int]:
    if not re.fullmatch("[0-9]{1,18},[0-9]{1,18}", text):
        raise ValueError("are no handles of two sockets")
    return [int(number) for number in text.split(",")]


HOST = Setting("host", host, "127.0.0.1", "address to listen on")
DATA = Setting("data", folder, "data", "folder of the database files")
TIMEOUT = Setting("timeout", seconds, "5", "seconds that a request may take")
QUIET = Setting("quiet", switch, "", "write no access log")
SHARED = [  # these, and those of the gateway, the supervisor knows too, and hands them on
    Setting("max-connections", count, "1024", "connections that each process keeps open at a time"),
    Setting("grace", seconds, "10", "seconds for what is in flight when a process is told to end"),
]
def service_url(name: str, port: int) -> Setting:
    """Return the setting that tells where a service is found (service discovery by configuration)."""
    return Setting(f"{name}-url", base_urls, f"http://127.0.0.1:{port}",
                   f"base URL of the {name} service; several, comma-separated, are its instances")


TOKEN = Setting("token", token, None, "the token that writes need", secret=True)
FOR_GATEWAY = [
    TIMEOUT,
    Setting("token-file", token_file, None, "file of the token that writes need; else MICROSHOP_TOKEN is that token"),
    Setting("rate", rate, None, "requests that one client may send, like 100/s (default: no limit)"),
    Setting("max-in-flight", count, "64", "requests under way to one service at a time"),
]


def read(program: str, settings: Sequence[Setting], check: Callable[[argparse.Namespace], None] | None = None,
         arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the value of each setting, and as `flags` the texts of those that were given as flags.

    Exits with status 2 where one is bad, or where `check` raises ValueError.
    """
    parser = _Parser(prog=f"python -m {program}", allow_abbrev=False,
                     description="Every flag has an environment twin: --data is MICROSHOP_DATA.")
    for setting in (setting for setting in settings if not setting.secret):
        kind: dict[str, Any] = {"action": "store_const", "const": "1"} if setting.parse is switch else {}
        default = f" (default: {setting.default})" if setting.default else ""
        parser.add_argument(f"--{setting.name}", help=setting.help + default, **kind)
    values = parser.parse_args(arguments)
    values.flags = {}
    for setting in settings:
        attribute = setting.name.replace("-", "_")
        source, text = f"--{setting.name}", getattr(values, attribute, None)
        if text is not None:
            values.flags[setting.name] = text
        else:
            source = f"MICROSHOP_{attribute.upper()}"
            text = os.environ.get(source)
            if not text and setting.default is not None:  # else it was to be something: better no shop than an open one
                text = setting.default
        try:
            setattr(values, attribute, None if text is None else setting.parse(text))
        except ValueError as reason:
            parser.error(f"{source}: {'what it holds' if setting.secret else repr(text)} {reason}")
    try:
        if check:
            check(values)
    except ValueError as reason:
        parser.error(str(reason))
    return values


def as_flags(values: argparse.Namespace, settings: Sequence[Setting]) -> list[str]:
    """Return those of the settings that were given as flags, as flags for another process."""
    return [f"--{setting.name}={values.flags[setting.name]}" for setting in settings if setting.name in values.flags]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")  # without the usage: one line
