"""The audit: do the databases of a shop agree? `python -m microshop.audit [--data FOLDER|--remote]`

Since each service owns its database, no constraint spans two of them; the audit checks what must
hold between them. Like the backup, and unlike any service, it opens the files of all services. The
shop may be running.

Without --data it checks the folder `data`, and those of shops that run with --fresh. With --remote
it asks the services for copies of their databases, and checks those: so it works in a cluster, too,
where each database is on a volume of its own. For each shop it prints one line, and one for each
violation. Exit status: 0 if all agree, 1 if there is a violation or a database cannot be read, 2 if
there is nothing to check or a setting is bad.

Law: it only reads; it changes and repairs nothing.
"""
import contextlib
import re
import sqlite3
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from microshop import SERVICES
from microshop.chassis import config, surroundings
from microshop.chassis.connections import get
from microshop.chassis.data_folder import missing_files
from microshop.chassis.database import MAX_COPY
from microshop.chassis.errors import ServiceError

PATIENCE = 60  # seconds within which an order must be finished
DEFAULT = Path("data")
MAGIC = b"SQLite format 3\0"  # the first bytes of every database


def parse_folder(text: str) -> Path | None:
    """Return the folder to check, or None for all that can be found."""
    return config.folder(text) if text else None


OPTIONS = [
    config.DATA._replace(
        parse=parse_folder, default="",
        help=f"folder to check (default: {DEFAULT}, and those of run_all --fresh)"),
    config.Setting("remote", config.switch, "",
                   "ask the services for copies of their databases, and check those"),
    *[config.service_url(name, port)._replace(
        help=f"base URL of the {name} service, for --remote; of several, the first is asked")
      for name, port in SERVICES.items()],
    config.TIMEOUT._replace(help="seconds for a service to send a copy, for --remote"),
]

# The text of each violation, and the query that finds it. A text has no number that changes while
# other orders are placed: see seen_twice(). (An order without `due` is finished. A reservation
# without productId was released. An order of schema version 1 has its own id as its reservation's.)
VIOLATIONS = {
    "product {}: {} units were supplied, but {} are free or reserved": """
        SELECT id, supplied, stock + (
            SELECT coalesce(sum(quantity), 0) FROM products_file.reservations
            WHERE productId = products.id) AS found
        FROM products_file.products WHERE supplied != found""",
    "order {} is confirmed for {} units of product {}, but {} of product {} are reserved": """
        SELECT o.id, o.quantity, o.productId, coalesce(r.quantity, 0),
               coalesce(r.productId, o.productId)
        FROM orders_file.orders AS o
        LEFT JOIN products_file.reservations AS r ON r.id = coalesce(reservation, o.id)
        WHERE status = 'confirmed' AND (o.quantity, o.productId) IS NOT (r.quantity, r.productId)
        """,
    "order {} is {}, but {} units of product {} are reserved for it": """
        SELECT o.id, status, r.quantity, r.productId
        FROM orders_file.orders AS o
        JOIN products_file.reservations AS r ON r.id = coalesce(reservation, o.id)
        WHERE status IN ('rejected', 'cancelled') AND due IS NULL AND r.productId IS NOT NULL""",
    "reservation {} is for {} units of product {}, but for no order": """
        SELECT id, quantity, productId FROM products_file.reservations
        WHERE productId IS NOT NULL
        AND id NOT IN (SELECT coalesce(reservation, id) FROM orders_file.orders)""",
    "order {} has been {} since {} (UTC), and is still not finished": """
        SELECT id, status, datetime(since, 'unixepoch') FROM orders_file.orders
        WHERE due IS NOT NULL AND since < :now - :patience""",
}


class CopyUnusable(Exception):
    """There is no copy that can be checked; the message says why and what to do, in one line."""


def find_violations(folder: Path) -> list[str]:
    """Return a line for each violation. Raises sqlite3.Error if a file cannot be read."""
    with attached_files(folder) as connection:
        return seen_twice(partial(run_queries, connection, last_moment(folder)))


def seen_twice(look: Callable[[], list[str]]) -> list[str]:
    """Look for violations twice, and return those that were found both times.

    While the shop is running, a look may read one database before a change and another one after
    it, and so find a difference that is not real: an order that was confirmed, say, after products
    was read and before orders was. The second look begins when the first has ended. So it finds
    that order's units reserved: orders only move forward, and both looks read the databases in the
    same order.
    """
    first = set(look())
    return [line for line in look() if line in first]


@contextlib.contextmanager
def attached_files(folder: Path) -> Iterator[sqlite3.Connection]:
    """Attach the file of each service, read-only, and check that it is not damaged."""
    if not folder.exists():
        raise sqlite3.OperationalError("there is no such folder; choose another --data")
    if missing := missing_files(folder, SERVICES):
        raise sqlite3.OperationalError(
            f"there is no {', no '.join(missing)}; choose another --data")
    with contextlib.closing(sqlite3.connect(":memory:", uri=True)) as connection:
        for name in SERVICES:
            path = (folder / f"{name}.db").absolute()
            uri = f"{path.as_uri()}?mode=ro"
            if not path.with_suffix(".db-wal").exists():
                uri += "&immutable=1"  # no process has it open; else SQLite would create a WAL file
            connection.execute(f"ATTACH ? AS {name}_file", [uri])
            if problem := find_damage(connection, name):
                raise sqlite3.DatabaseError(f"{name}.db: {' '.join(problem.splitlines())}")
        yield connection


def find_damage(connection: sqlite3.Connection, name: str) -> str:
    """Return what is wrong with the attached file of a service, or "" if nothing is."""
    try:
        (first,) = connection.execute(f"PRAGMA {name}_file.quick_check").fetchone()
    except sqlite3.DatabaseError as error:  # it is damaged so much that the check fails, too
        return str(error)
    return "" if first == "ok" else first


def last_moment(folder: Path) -> float:
    """Return until when orders could be finished: until now, or until the shop stopped.

    Of a backup, or of a shop that was stopped in good order, no write-ahead log is left.
    """
    if any(folder.glob("*.db-wal")):
        return time.time()
    return max((folder / f"{name}.db").stat().st_mtime for name in SERVICES)


def run_queries(connection: sqlite3.Connection, now: float) -> list[str]:
    """Run every query; return a line for each row found. `now` is in seconds since 1970."""
    values = {"now": now, "patience": PATIENCE}
    lines = []
    for text, query in VIOLATIONS.items():
        lines += [text.format(*row) for row in connection.execute(query, values)]
    return lines


# --- copies, for which it asks the services

def find_remote_violations(urls: dict[str, str], timeout: float) -> list[str]:
    """Return a line for each violation in a shop whose services are at these base URLs.

    `timeout` is in seconds for a copy. Raises CopyUnusable if a service does not send one.
    """
    return seen_twice(partial(look_at_copies, urls, timeout))


def look_at_copies(urls: dict[str, str], timeout: float) -> list[str]:
    """Return a line for each violation in new copies. Raises CopyUnusable, or sqlite3.Error.

    The copies are files: in memory, all of them may need more than a container is given.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for service, url in urls.items():
            (folder / f"{service}.db").write_bytes(fetch_copy(service, url, timeout))
        with attached_files(folder) as connection:
            for service, url in urls.items():
                if not has_table(connection, service):
                    raise CopyUnusable(f"{url}/database is not the database of {service}; check "
                                       "which service is at which URL")
            return run_queries(connection, time.time())


def has_table(connection: sqlite3.Connection, service: str) -> bool:
    """Return whether the attached database of a service has the table with the service's name."""
    return bool(connection.execute(
        f"SELECT 1 FROM {service}_file.sqlite_master WHERE type = 'table' AND name = ?",
        [service]).fetchall())


def fetch_copy(service: str, url: str, timeout: float) -> bytes:
    """Return a copy of the database of the service at a base URL. Raises CopyUnusable."""
    other = f"another service is there, or an older version; give another --{service}-url"
    try:
        reply = get(f"{url}/database", time.monotonic() + timeout, MAX_COPY)
        if reply.status == 200 and reply.body.startswith(MAGIC):
            return reply.body
        if reply.status >= 500:
            why = " ".join(reply.detail.split())
        elif reply.status == 200:
            why = f"this is no database: {other}"
        else:
            why = f"answered {reply.status}: {other}"
    except ServiceError as error:  # the answer is too large, or not valid HTTP
        why = f"{error.detail}: {other}"
    except TimeoutError as error:
        why = (f"{str(error) or 'no answer'} (--timeout is {timeout:g} s); "
               "is the service running, and not paused?")
    except (OSError, EOFError) as error:
        why = str(error) or "the connection broke"  # a host name that is unknown says what to do
        if reason := getattr(error, "strerror", ""):
            why = f"{reason}; start the service there, or give another --{service}-url"
    raise CopyUnusable(f"cannot copy the database of {service} from {url}/database: {why}")


# --- the command

def find_folders() -> list[Path]:
    """Return the default folder if it has any database, and the folders of run_all --fresh.

    Those are in the system's temporary folder; only the ones with all databases are returned.
    """
    temporary = sorted(Path(tempfile.gettempdir()).glob("microshop-*"))
    folders = [folder for folder in temporary if not missing_files(folder, SERVICES)]
    if len(missing_files(DEFAULT, SERVICES)) < len(SERVICES):
        folders.insert(0, DEFAULT)
    return folders


def check_flags(settings: Namespace) -> None:
    """Raise ValueError for flags that contradict each other, and for an empty --data.

    (Inside, an empty one means all folders that can be found.)
    """
    if settings.flags.get("data") == "":
        raise ValueError("--data: '' is not a folder")
    if settings.remote and "data" in settings.flags:
        raise ValueError("--remote and --data contradict each other; choose one")
    for name in SERVICES:
        if f"{name}-url" in settings.flags and not settings.remote:
            raise ValueError(f"--{name}-url has no effect without --remote; add that")


def check(where: str, find: Callable[[], list[str]]) -> bool:
    """Let `find` look for violations; print them, and return whether there are none.

    `where` says, for the messages, where the databases are.
    """
    try:
        violations = find()
    except CopyUnusable as error:
        print(f"audit: {error}", file=sys.stderr)
        return False
    except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
        why = str(error)
        if re.match("no such (table|column)", why):  # the files are new, or of an older version
            why = "the tables are not there yet; start the shop, or wait until it is ready"
        print(f"audit: cannot read the databases {where}: {why}", file=sys.stderr)
        return False
    print(f"the databases {where} {'do not agree:' if violations else 'agree'}")
    for line in violations:
        print(f"  {line}")
    return not violations


def main() -> None:
    surroundings.prepare()
    settings = config.read("microshop.audit", OPTIONS, check_flags, purpose=(
        "Check whether the databases of a shop, which may be running, agree."))
    if settings.remote:  # of several instances of a service, the first is asked
        urls = {name: getattr(settings, f"{name}_url")[0] for name in SERVICES}
        find = partial(find_remote_violations, urls, settings.timeout)
        sys.exit(0 if check(f"of {', '.join(urls.values())}", find) else 1)
    folders = [settings.data] if settings.data else find_folders()
    if not folders:
        print(f"audit: there is no database in {DEFAULT}; start the shop with python -m "
              "microshop.run_all, or give the folder of its databases with --data",
              file=sys.stderr)
        sys.exit(2)
    agree = [check(f"in {folder}", partial(find_violations, folder)) for folder in folders]
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
