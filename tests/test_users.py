"""The users service, as its clients see it."""
import unittest

from microshop.users import Users
from tests.collection import CollectionTests


class UsersTest(CollectionTests, unittest.TestCase):
    service, path = Users, "/users"
    summaries = [{"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}]
    item = {"id": 1, "name": "Alice"}
    insert = "INSERT INTO users VALUES (?, 'Carol')"


if __name__ == "__main__":
    unittest.main()
