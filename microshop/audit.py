"""The audit: do the three databases agree? `python -m microshop.audit [--data data]`

The one tool that opens the files of services, all of them, and only to read: no service may, since each owns
its file. The shop may be open or closed. Prints a line for each breach; exit status 0 if there is none, else 1.
Law: it writes nothing and mends nothing.
"""
import sqlite3
import sys
import time
from pathlib import Path

from microshop import SERVICES
from microshop.chassis import config

PATIENCE = 60  # seconds in which an order must come to its end

BREACHES = {  # each as it is told, and the query that finds it
    "product {}: {} units were supplied, but {} are free and {} reserved": """
        SELECT * FROM (SELECT id, supplied, stock, (SELECT coalesce(sum(quantity), 0) FROM reservations
                                                    WHERE productId = products.id) AS reserved FROM products)
        WHERE supplied != stock + reserved""",
    "order {} is confirmed for {} units of product {}, but {} of product {} are reserved": """
        SELECT id, o.quantity, o.productId, coalesce(r.quantity, 0), coalesce(r.productId, o.productId)
        FROM orders AS o LEFT JOIN reservations AS r ON orderId = id
        WHERE status = 'confirmed' AND (o.quantity, o.productId) IS NOT (r.quantity, r.productId)""",
    "order {} is {}, but {} units of product {} are reserved for it": """
        SELECT id, status, r.quantity, r.productId FROM orders JOIN reservations AS r ON orderId = id
        WHERE status IN ('rejected', 'cancelled') AND due IS NULL AND r.productId IS NOT NULL""",
    "order {} is not there, but {} units of product {} are reserved for it": """
        SELECT orderId, r.quantity, r.productId FROM reservations AS r LEFT JOIN orders ON orderId = id
        WHERE r.productId IS NOT NULL AND id IS NULL""",
    "order {} is {} since {} (UTC), and not at its end": """
        SELECT id, status, datetime(since, 'unixepoch') FROM orders
        WHERE due IS NOT NULL AND since < :now - :patience""",
}


def find_breaches(folder: Path) -> list[str]:
    """Return a line for each breach. Raises sqlite3.Error where a file cannot be read.

    While the shop is open, a query may see one file as it was before a change and another as it is after. It
    cannot see so twice, since an order only moves forward: what counts is what comes up in two looks.
    """
    connection = sqlite3.connect(":memory:", uri=True)
    try:
        for name in SERVICES:
            path = (folder / f"{name}.db").absolute()
            closed = "" if path.with_suffix(".db-wal").exists() else "&immutable=1"  # else SQLite would leave a log
            connection.execute(f"ATTACH ? AS {name}_file", [f"{path.as_uri()}?mode=ro{closed}"])
            for problem, in connection.execute(f"PRAGMA {name}_file.quick_check"):
                if problem != "ok":
                    raise sqlite3.DatabaseError(f"{name}.db: {' '.join(problem.splitlines())}")
        first, second = ([text.format(*row) for text, query in BREACHES.items() for row in connection.execute(
            query, {"now": time.time(), "patience": PATIENCE})] for _ in range(2))
        return [line for line in second if line in set(first)]
    finally:
        connection.close()


def main() -> None:
    settings = config.read("microshop.audit", [config.DATA])
    try:
        breaches = find_breaches(settings.data)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        sys.exit(f"audit: cannot read the databases in {settings.data}: {error}")
    print("\n".join(breaches) or f"the databases in {settings.data} agree")
    sys.exit(bool(breaches))


if __name__ == "__main__":
    main()
