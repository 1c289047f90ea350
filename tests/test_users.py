"""The users service, as its clients see it."""
import unittest

from microshop.users import Users
from tests.collection import WritableCollectionTests


class UsersTest(WritableCollectionTests, unittest.TestCase):
    service, path = Users, "/users"
    summaries = [{"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}]
    item = {"id": 1, "name": "Alice"}
    insert = "INSERT INTO users VALUES (?, 'Carol')"
    content = {"name": "Zoë"}
    wrong = [
        ({"name": "Ann", "stock": 1}, ["stock"]),
        ({"name": "", "age": 7, "sex": "?"}, ["age", "name", "sex"])]


if __name__ == "__main__":
    unittest.main()
