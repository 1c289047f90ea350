"""What the processes of the shop need of each other: both ends keep the contracts."""
import contextlib
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from microshop import SERVICES
from microshop.chassis.tracing import Trace
from microshop.gateway import Gateway
from microshop.orders import Orders, Saga, add_order, move_order
from microshop.users import Users
from tests.contract import FOLDER, complete, differences, fits, load, replay, served
from tests.helpers import PATIENCE, ask, running, running_shop, service_of

NAMES = sorted(path.stem for path in FOLDER.iterdir())
BEHIND_THE_GATEWAY = [f"gateway-{service}" for service in SERVICES]


@contextlib.contextmanager
def running_provider(name):
    """Run the real service, with all that it needs, and the seed's rows."""
    if name == "orders":
        with running_shop() as shop:
            yield shop.orders
    else:
        with running(service_of(name)) as service:
            yield service


def without_health(contract):
    """Leave out what only the gateway itself asks, and no client through it."""
    interactions = [interaction for interaction in contract["interactions"]
                    if interaction["request"]["target"] != "/health"]
    return {**contract, "interactions": interactions}


def failures(contract, port):
    """Return how many interactions a provider fails."""
    case = unittest.FunctionTestCase(lambda: replay(case, contract, port))
    return len(case.run().failures)


class FormatTest(unittest.TestCase):
    def test_there_is_a_contract_for_each_pair_of_processes_that_talk(self):
        self.assertEqual(NAMES, sorted([*BEHIND_THE_GATEWAY, "orders-products", "orders-users"]))

    def test_each_contract_has_the_agreed_format(self):
        for name in NAMES:
            contract = load(name)
            self.assertEqual(set(contract), {"consumer", "provider", "interactions"})
            self.assertEqual(f"{contract['consumer']}-{contract['provider']}", name)
            for interaction in contract["interactions"]:
                with self.subTest(name, what=interaction["what"]):
                    self.assertEqual(set(interaction), {"what", "request", "answer"})
                    self.assertEqual(set(complete(interaction["request"])),
                                     {"method", "target", "headers", "content"})
                    self.assertEqual(set(complete(interaction["answer"])),
                                     {"status", "headers", "content"})
                    self.assertRegex(interaction["what"], r"^[A-Z].*\.$", "not a sentence")

    def test_a_value_fits_if_it_is_equal_apart_from_members_that_were_not_asked_for(self):
        for wanted, found, expected in (
                ({"id": 1}, {"id": 1, "name": "Alice"}, True),
                ({"id": 1}, {"name": "Alice"}, False),
                ({"id": 1}, [{"id": 1}], False),
                ({"id": {"a": [1]}}, {"id": {"a": [1], "b": 2}}, True),
                ([{"id": 1}], [{"id": 1, "name": "Alice"}], True),
                ([1], [1, 2], False), ([1, 2], [1], False),
                (1, True, False), (1, 1.0, False), ("1", 1, False), (1, 2, False),
                (None, None, True),
                ({"detail": "<any>"}, {"detail": "gone"}, True), ({"detail": "<any>"}, {}, False)):
            with self.subTest(wanted=wanted, found=found):
                self.assertEqual(fits(wanted, found), expected)


    def test_each_difference_is_named_by_its_path(self):
        wanted = {"id": 1, "schemas": {"Review": {"properties": {"name": {"type": "string"}}}},
                  "rows": [{"id": 1}, {"id": 2}], "all": [1, 2]}
        found = {"id": True, "schemas": {"Review": {"properties": {"text": {}}}},
                 "rows": [{"id": 1}, {"id": "2"}], "all": [1]}
        self.assertEqual(list(differences(wanted, found)), [
            "id is true; agreed is 1",
            'schemas.Review.properties.name is missing; agreed is {"type": "string"}',
            'rows[1].id is "2"; agreed is 2',
            "all has 1 items, not 2: [1]"])
        self.assertEqual(list(differences([1], 7)), ["it is 7; agreed is [1]"])

    def test_a_contract_that_lacks_what_the_gateway_needs_of_every_service_is_named(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(mock.patch("tests.contract.FOLDER", folder))
        health = {"request": {"method": "GET", "target": "/health"}}
        for interactions, target in (([], "/health"), ([health], "/reviews")):
            contract = {"provider": "reviews", "interactions": interactions}
            (folder / "gateway-reviews.json").write_text(json.dumps(contract))
            with self.assertRaisesRegex(
                    AssertionError, f"^tests/contracts/gateway-reviews.json .* GET {target}: "):
                load("gateway-reviews")


class ProvidersTest(unittest.TestCase):
    def test_each_provider_keeps_its_contracts(self):
        for name in NAMES:
            contract = load(name)
            with running_provider(contract["provider"]) as service:
                replay(self, contract, service.server_port)

    def test_a_provider_that_breaks_its_contract_is_noticed(self):
        contract = load("gateway-users")
        for part, other in (("status", 299), ("headers", {"location": "/elsewhere"}),
                            ("content", {"id": "3"})):
            *others, last = contract["interactions"]
            last = {**last, "answer": {**last["answer"], part: other}}
            with self.subTest(part), running(Users) as users:
                broken = {**contract, "interactions": [*others, last]}
                self.assertEqual(failures(broken, users.server_port), 1)


class StubTest(unittest.TestCase):
    def test_a_stub_keeps_its_contract(self):
        for name in NAMES:
            with served(load(name)) as stub:
                replay(self, load(name), stub.server_address[1])
                self.assertEqual(stub.unasked, [])

    def test_a_request_outside_the_contract_gets_500_and_fails_the_test(self):
        reservation = b'{"productId": 101, "quantity": 2}'
        json_type = {"Content-Type": "application/json"}
        for request in (
                ("GET", "/reservations/4203"), ("DELETE", "/reservations/4207"),
                ("DELETE", "/reservations/4203?x"),
                ("PUT", "/reservations/4203", {}, reservation),
                ("PUT", "/reservations/4203", json_type, b"{}"),
                ("PUT", "/reservations/4203", json_type, b'{"productId": 101, "quantity": true}')):
            with (self.subTest(request),
                  self.assertRaisesRegex(AssertionError, "not in the contract with products"),
                  served(load("orders-products")) as stub):
                self.assertEqual(ask(stub.server_address[1], *request).status, 500)


class OrdersOnStubsTest(unittest.TestCase):
    def setUp(self):
        self.stubs = {name: self.enterContext(served(load(f"orders-{name}")))
                      for name in ("users", "products")}
        urls = {f"{name}_url": [stub.url] for name, stub in self.stubs.items()}
        self.orders = self.enterContext(running(Orders, **urls))

    def add(self, user, product, quantity):
        """Store an order whose reservation has an id that is in the contract; return its id."""
        fields = {"userId": user, "productId": product, "quantity": quantity}
        order, _ = add_order(self.orders.database, fields, None)
        self.orders.database.write(
            "UPDATE orders SET reservation = 4000 + id WHERE id = ?", [order])
        return order

    def worker(self, order):
        """Return a worker that has read an order, and goes on with it at advance()."""
        return Saga(self.orders, order, Trace("a-worker"))

    def assert_ends(self, order, *expected):
        found = ask(self.orders.server_port, "GET", f"/orders/{order}").json
        self.assertEqual((found["status"], found.get("reason")), expected)

    def test_the_saga_asks_for_all_that_is_in_its_contracts_and_for_nothing_else(self):
        order = self.add(1, 101, 2)
        quick, slow, late = (self.worker(order) for _ in range(3))
        quick.advance()
        slow.advance()
        self.assert_ends(order, "confirmed", None)
        move_order(self.orders.database, order, "cancelling")
        quick, slow = (self.worker(order) for _ in range(2))
        quick.advance()
        slow.advance()
        late.advance()
        self.assert_ends(order, "cancelled", None)
        for fields, reason in (((1, 101, 1000), "<any>"),
                               ((1, 999, 1), "productId: there is no product 999"),
                               ((999, 101, 1), "userId: there is no user 999")):
            order = self.add(*fields)
            self.worker(order).advance()
            self.assert_ends(order, "rejected", reason)
        for name, stub in self.stubs.items():
            self.assertEqual(stub.unasked, [], f"orders did not ask {name} for these")


class GatewayOnStubsTest(unittest.TestCase):
    def test_the_gateway_asks_for_all_that_is_in_its_contracts_and_for_nothing_else(self):
        missing = [name for name in SERVICES if f"gateway-{name}" not in NAMES]
        self.assertEqual(missing, [], "services without a tests/contracts/gateway-NAME.json")
        contracts = {name: load(f"gateway-{name}") for name in SERVICES}
        stubs = {name: self.enterContext(served(contract)) for name, contract in contracts.items()}
        urls = {f"{name}_url": [stub.url] for name, stub in stubs.items()}
        gateway = self.enterContext(running(Gateway, **urls))
        for contract in contracts.values():
            replay(self, without_health(contract), gateway.server_port)
        order = ask(gateway.server_port, "GET", "/orders/201?expand=user,product").json
        self.assertEqual((order["user"]["name"], order["product"]["name"]), ("Alice", "Laptop"))
        self.enterContext(mock.patch("microshop.gateway.HEALTH_TIME", PATIENCE))
        health = ask(gateway.server_port, "GET", "/health").json
        self.assertEqual((health["status"], health["services"]),
                         ("ok", dict.fromkeys(SERVICES, "ok")))
        for name, stub in stubs.items():
            self.assertEqual(stub.unasked, [], f"the gateway did not ask {name} for these")


if __name__ == "__main__":
    unittest.main()
