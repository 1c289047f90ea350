"""The backup: copies the databases of a shop, which may be running, as they were at one moment.

    python -m microshop.backup [--data FOLDER] --to NEW_FOLDER

The databases must fit together: if one were copied a second later than another, the copy would have
an order whose units are not reserved, or the other way round. So no service may write for the
moment in which this tool begins to read all files. It goes on reading them as they were then
(snapshot isolation), while the services write again.

To restore, stop the shop, replace its whole data folder by a copy of the backup, and start it: a
write-ahead log that is left of the old files does not fit the new ones.

Exit status: 0 if all was copied, 1 if a file cannot be read or written, 2 if a setting is bad.

Law: it changes no database of the shop.
"""
import sqlite3
import sys
from argparse import Namespace
from contextlib import closing
from pathlib import Path

from microshop import SERVICES
from microshop.chassis import config, surroundings
from microshop.chassis.data_folder import missing_files

LOCK_TIME = 1.0  # seconds to wait for each write lock; the services wait for one up to 3 s


OPTIONS = [
    config.DATA,
    config.Setting("to", config.folder, None, "new folder for the copies"),
]


def check(settings: Namespace) -> None:
    """Raise ValueError if there is nothing to copy, or no place for the copies."""
    if not settings.to:
        raise ValueError("--to is missing: the new folder for the copies")
    if settings.to.exists() and any(settings.to.iterdir()):
        raise ValueError(f"--to: {settings.to} is not empty; choose a new folder")
    if missing := missing_files(settings.data, SERVICES):
        raise ValueError(f"--data: there is no {', no '.join(missing)} in {settings.data}")
    if settings.to.resolve().is_relative_to(settings.data.resolve()):
        raise ValueError(f"--to: {settings.to} is inside {settings.data}, which a restore replaces")


def open_files(folder: Path) -> sqlite3.Connection:
    """Return a connection to the files of all services. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        ":memory:", timeout=LOCK_TIME, isolation_level=None, uri=True)
    for name in SERVICES:
        uri = (folder / f"{name}.db").absolute().as_uri()
        connection.execute(f"ATTACH ? AS {name}_file", [f"{uri}?mode=rw"])
    return connection


def back_up(folder: Path, target: Path) -> None:
    """Copy the databases in a folder to another. Raises sqlite3.Error, OSError.

    A copy gets its name when all are complete, so a part of a backup cannot be taken for one.
    """
    with closing(open_files(folder)) as locker, closing(open_files(folder)) as reader:
        locker.execute("BEGIN IMMEDIATE")  # takes the write locks of all files
        reader.execute("BEGIN")
        for name in SERVICES:  # whatever is read: the file is seen as it is now until the end
            reader.execute(f"PRAGMA {name}_file.user_version").fetchone()
        locker.execute("ROLLBACK")
        target.mkdir(parents=True, exist_ok=True)
        try:
            for name in SERVICES:
                with closing(sqlite3.connect(target / f"{name}.partial")) as copy:
                    reader.backup(copy, name=f"{name}_file")
        except BaseException:  # the disk may be full: do not keep what is of no use
            for path in target.glob("*.partial*"):
                path.unlink()
            raise
    for name in SERVICES:
        (target / f"{name}.partial").rename(target / f"{name}.db")


def main() -> None:
    surroundings.prepare()
    settings = config.read("microshop.backup", OPTIONS, check, purpose=(
        "Copy the databases of a shop, which may be running, as they are at one moment."))
    try:
        back_up(settings.data, settings.to)
    except (sqlite3.Error, OSError) as error:
        sys.exit(f"backup: cannot copy {settings.data} to {settings.to}: {error}")
    print(f"copied {', '.join(f'{name}.db' for name in SERVICES)} from {settings.data} to "
          f"{settings.to}; to restore: stop the shop, replace the whole folder {settings.data} by "
          "a copy of that one, and start the shop")


if __name__ == "__main__":
    main()
