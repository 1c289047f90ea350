"""The users service: who may order. Owns users.db.

Read from top to bottom: what is stored, how it is found and changed, what is answered, the process.
Law: SQL stands in the queries alone; nothing here knows of products or orders.
"""
from functools import partial

from microshop import SERVICES
from microshop.chassis.content import Page, Text
from microshop.chassis.database import Database
from microshop.chassis.errors import NotFound
from microshop.chassis.handler import Answer, Handler
from microshop.chassis.server import Service

SCHEMA = [[  # the statements of version 1
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL)",
    "INSERT INTO users VALUES (1, 'Alice'), (2, 'Bob')",
]]


FIELDS = {"name": Text()}  # what a client says of a user


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


def add_user(database: Database, fields: dict) -> dict:
    return {"id": database.write("INSERT INTO users (name) VALUES (:name)", fields).lastrowid, **fields}


def change_user(database: Database, user_id: int, fields: dict) -> dict:
    """Change a user that is there, within a transaction."""
    database.connection().execute("UPDATE users SET name = :name WHERE id = :id", {"id": user_id, **fields})
    return {"id": user_id, **fields}


def delete_user(database: Database, user_id: int) -> None:
    database.connection().execute("DELETE FROM users WHERE id = ?", [user_id])


# --- routes

class UsersHandler(Handler):
    def list_users(self) -> Answer:
        return self.answer_page(partial(find_users, self.server.database))

    def get_user(self, user_id: int) -> Answer:
        return Answer(find_user(self.server.database, user_id))

    def post_user(self) -> Answer:
        user = add_user(self.server.database, self.read_fields(FIELDS))
        return Answer(user, 201, [("Location", f"/users/{user['id']}")])

    def put_user(self, user_id: int) -> Answer:
        fields = self.read_fields(FIELDS)
        with self.changing(find_user, user_id):
            return Answer(change_user(self.server.database, user_id, fields))

    def delete_user(self, user_id: int) -> Answer:
        with self.changing(find_user, user_id):
            delete_user(self.server.database, user_id)
        return Answer(status=204)

    routes = {
        "/users": {"GET": list_users, "POST": post_user},
        "/users/{id}": {"GET": get_user, "PUT": put_user, "DELETE": delete_user},
    }


# --- the process

class Users(Service):
    name, title, port = "users", "Users service", SERVICES["users"]
    handler, schema = UsersHandler, SCHEMA


if __name__ == "__main__":
    Users.main()
