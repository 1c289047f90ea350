"""The audit: do the databases of a shop agree? `python -m microshop.audit [--data FOLDER]`

Since each service owns its database, no constraint spans two of them; the audit checks what must
hold between them. Like the backup, and unlike any service, it opens the files of all services. The
shop may be running.

Without --data it checks the folder `data`, and those of shops that run with --fresh. For each it
prints one line, and one for each violation. Exit status: 0 if all agree, 1 if there is a
violation or a file cannot be read, 2 if there is nothing to check.

Law: it only reads; it changes and repairs nothing.
"""
import contextlib
import re
import sqlite3
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from microshop import SERVICES
from microshop.chassis import config, surroundings
from microshop.chassis.data_folder import missing_files

PATIENCE = 60  # seconds within which an order must be finished
DEFAULT = Path("data")


def parse_folder(text: str) -> Path | None:
    """Return the folder to check, or None for all that can be found."""
    return config.folder(text) if text else None


DATA = config.DATA._replace(
    parse=parse_folder, default="",
    help=f"folder to check (default: {DEFAULT}, and those of run_all --fresh)")

VIOLATIONS = {  # the text of each, and the query that finds it
    "product {}: {} units were supplied, but {} are free and {} reserved": """
        SELECT * FROM (
            SELECT id, supplied, stock, (
                SELECT coalesce(sum(quantity), 0) FROM reservations WHERE productId = products.id
            ) AS reserved FROM products)
        WHERE supplied != stock + reserved""",
    "order {} is confirmed for {} units of product {}, but {} of product {} are reserved": """
        SELECT o.id, o.quantity, o.productId, coalesce(r.quantity, 0),
               coalesce(r.productId, o.productId)
        FROM orders AS o LEFT JOIN reservations AS r ON r.id = coalesce(reservation, o.id)
        WHERE status = 'confirmed' AND (o.quantity, o.productId) IS NOT (r.quantity, r.productId)
        """,
    "order {} is {}, but {} units of product {} are reserved for it": """
        SELECT o.id, status, r.quantity, r.productId
        FROM orders AS o JOIN reservations AS r ON r.id = coalesce(reservation, o.id)
        WHERE status IN ('rejected', 'cancelled') AND due IS NULL AND r.productId IS NOT NULL""",
    "reservation {} is for {} units of product {}, but for no order": """
        SELECT id, quantity, productId FROM reservations
        WHERE productId IS NOT NULL
        AND id NOT IN (SELECT coalesce(reservation, id) FROM orders)""",
    "order {} has been {} since {} (UTC), and is still not finished": """
        SELECT id, status, datetime(since, 'unixepoch') FROM orders
        WHERE due IS NOT NULL AND since < :now - :patience""",
}


def find_violations(folder: Path) -> list[str]:
    """Return a line for each violation. Raises sqlite3.Error if a file cannot be read.

    While the shop is running, a query may read one file before a change and another file after it,
    and so find a difference that is not real. It would not find the same one again, since orders
    only move forward. So we look twice, and keep what was found both times.
    """
    with contextlib.closing(sqlite3.connect(":memory:", uri=True)) as connection:
        attach_files(connection, folder)
        now = last_moment(folder)
        first = set(run_queries(connection, now))
        second = run_queries(connection, now)
    return [line for line in second if line in first]


def attach_files(connection: sqlite3.Connection, folder: Path) -> None:
    """Attach the file of each service, read-only, and check that it is not damaged."""
    if not folder.exists():
        raise sqlite3.OperationalError("there is no such folder; choose another --data")
    if missing := missing_files(folder, SERVICES):
        raise sqlite3.OperationalError(
            f"there is no {', no '.join(missing)}; choose another --data")
    for name in SERVICES:
        path = (folder / f"{name}.db").absolute()
        uri = f"{path.as_uri()}?mode=ro"
        if not path.with_suffix(".db-wal").exists():
            uri += "&immutable=1"  # no process has it open; else SQLite would create a WAL file
        connection.execute(f"ATTACH ? AS {name}_file", [uri])
        for (problem,) in connection.execute(f"PRAGMA {name}_file.quick_check"):
            if problem != "ok":
                raise sqlite3.DatabaseError(f"{name}.db: {' '.join(problem.splitlines())}")


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


def find_folders() -> list[Path]:
    """Return the default folder if it has any database, and the folders of run_all --fresh.

    Those are in the system's temporary folder; only the ones with all databases are returned.
    """
    temporary = sorted(Path(tempfile.gettempdir()).glob("microshop-*"))
    folders = [folder for folder in temporary if not missing_files(folder, SERVICES)]
    if len(missing_files(DEFAULT, SERVICES)) < len(SERVICES):
        folders.insert(0, DEFAULT)
    return folders


def refuse_empty_flag(settings: Namespace) -> None:
    """Raise ValueError for --data "", which would mean: all folders that can be found."""
    if settings.flags.get("data") == "":
        raise ValueError("--data: '' is not a folder")


def check(folder: Path) -> bool:
    """Print and return whether the databases in a folder agree."""
    try:
        violations = find_violations(folder)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        why = str(error)
        if re.match("no such (table|column)", why):  # the files are new, or of an older version
            why = "the tables are not there yet; start the shop, or wait until it is ready"
        print(f"audit: cannot read the databases in {folder}: {why}", file=sys.stderr)
        return False
    print(f"the databases in {folder} {'do not agree:' if violations else 'agree'}")
    for line in violations:
        print(f"  {line}")
    return not violations


def main() -> None:
    surroundings.prepare()
    settings = config.read("microshop.audit", [DATA], refuse_empty_flag)
    folders = [settings.data] if settings.data else find_folders()
    if not folders:
        print(f"audit: there is no database in {DEFAULT}; start the shop with python -m "
              "microshop.run_all, or give the folder of its databases with --data",
              file=sys.stderr)
        sys.exit(2)
    agree = [check(folder) for folder in folders]
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
