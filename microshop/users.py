"""The users service: the people who may order.

Database per service: no other service opens users.db; the others ask this one over HTTP.
Read from top to bottom: the schema, the queries, the routes, the process.

Law: SQL appears only in the schema and the queries. Nothing here knows about products or orders.
"""
from functools import partial

from microshop import SERVICES
from microshop.chassis.answer import Answer
from microshop.chassis.content import ID, Page, Text
from microshop.chassis.database import Database, Transaction
from microshop.chassis.errors import NotFound
from microshop.chassis.handler import Handler
from microshop.chassis.openapi import Operation, resource
from microshop.chassis.server import Service

# --- the schema

SCHEMA = [[  # the statements of version 1
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL)",
    "INSERT INTO users VALUES (1, 'Alice'), (2, 'Bob')",
]]

FIELDS = {"name": Text()}  # what a client sends to create or replace a user


# --- the queries

def find_users(database: Database, page: Page) -> list[dict]:
    """Return the summaries on a page, plus one extra row if there is a next page."""
    chosen = "id IN (SELECT value FROM json_each(:ids)) AND" if page.ids else ""
    return database.rows(
        f"SELECT id, name FROM users WHERE {chosen} id > :after ORDER BY id LIMIT :limit + 1",
        vars(page))


def find_user(database: Database | Transaction, user_id: int) -> dict:
    """Return a user. Raises NotFound."""
    rows = database.rows("SELECT id, name FROM users WHERE id = ?", [user_id])
    if not rows:
        raise NotFound(f"there is no user {user_id}")
    return rows[0]


def add_user(database: Database, fields: dict) -> dict:
    added = database.write("INSERT INTO users (name) VALUES (:name)", fields)
    return {"id": added.lastrowid, **fields}


def change_user(transaction: Transaction, user_id: int, fields: dict) -> dict:
    """Change a user, which must exist; return it."""
    user = {"id": user_id, **fields}
    transaction.write("UPDATE users SET name = :name WHERE id = :id", user)
    return user


def delete_user(transaction: Transaction, user_id: int) -> None:
    transaction.write("DELETE FROM users WHERE id = ?", [user_id])


# --- the routes

class UsersHandler(Handler):
    def list_users(self) -> Answer:
        return self.answer_page(partial(find_users, self.server.database))

    def get_user(self, user_id: int) -> Answer:
        return Answer(find_user(self.server.database, user_id))

    def create_user(self) -> Answer:
        user = add_user(self.server.database, self.read_fields(FIELDS))
        return Answer(user, 201, [("Location", f"/users/{user['id']}")])

    def replace_user(self, user_id: int) -> Answer:
        fields = self.read_fields(FIELDS)
        # changing() raises if there is no such user, or if If-Match does not fit (404, 412).
        with self.changing(find_user, user_id) as transaction:
            user = change_user(transaction, user_id, fields)
        return Answer(user)

    def remove_user(self, user_id: int) -> Answer:
        with self.changing(find_user, user_id) as transaction:
            delete_user(transaction, user_id)
        return Answer(status=204)

    routes = {
        "/users": {"GET": list_users, "POST": create_user},
        "/users/{id}": {"GET": get_user, "PUT": replace_user, "DELETE": remove_user},
    }

    # What is published about them (see chassis/openapi.py)
    schemas = {"User": resource({"id": ID, **FIELDS})}
    operations = {
        "GET /users": Operation("listUsers", {200: ["User"]}),
        "POST /users": Operation("createUser", {201: "User"}, FIELDS),
        "GET /users/{id}": Operation("getUser", {200: "User"}),
        "PUT /users/{id}": Operation("replaceUser", {200: "User"}, FIELDS),
        "DELETE /users/{id}": Operation("deleteUser", {204: None}),
    }


# --- the process

class Users(Service):
    name, title, port = "users", "Users service", SERVICES["users"]
    handler, schema = UsersHandler, SCHEMA


if __name__ == "__main__":
    Users.main()
