"""The users service: who may order. Owns users.db.

Read from top to bottom: what is stored, how it is found, what is answered, the process.
Law: SQL stands in the queries alone; nothing here knows of products or orders.
"""
from functools import partial

from microshop.chassis.content import Page
from microshop.chassis.database import Database
from microshop.chassis.errors import NotFound
from microshop.chassis.server import Answer, Handler, Service

SCHEMA = [[  # the statements of version 1
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL)",
    "INSERT INTO users VALUES (1, 'Alice'), (2, 'Bob')",
]]


# --- queries

def find_users(database: Database, page: Page) -> list[dict]:
    """Return the summaries of a page, and one more where more follow."""
    chosen = "id IN (SELECT value FROM json_each(:ids)) AND" if page.ids else ""
    return database.rows(f"SELECT id, name FROM users WHERE {chosen} id > :after ORDER BY id LIMIT :limit + 1",
                         page._asdict())


def find_user(database: Database, user_id: int) -> dict:
    """Return a user. Raises NotFound."""
    rows = database.rows("SELECT id, name FROM users WHERE id = ?", [user_id])
    if not rows:
        raise NotFound(f"there is no user {user_id}")
    return rows[0]


# --- routes

class UsersHandler(Handler):
    def list_users(self) -> Answer:
        return self.answer_page(partial(find_users, self.server.database))

    def get_user(self, user_id: int) -> Answer:
        return Answer(find_user(self.server.database, user_id))

    routes = {
        "/users": {"GET": list_users},
        "/users/{id}": {"GET": get_user},
    }


# --- the process

class Users(Service):
    name, title, port = "users", "Users service", 3001
    handler, schema = UsersHandler, SCHEMA


if __name__ == "__main__":
    Users.main()
