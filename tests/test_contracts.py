"""What the processes of the shop need of each other, told once and held to at both ends."""
import contextlib
import unittest

from microshop.gateway import SERVICES, Gateway
from microshop.orders import Orders, Saga, add_order, move_order
from microshop.products import Products
from microshop.users import Users
from tests.contract import FOLDER, fits, load, replay, served, whole
from tests.helpers import ask, running, running_shop

NAMES = sorted(path.stem for path in FOLDER.iterdir())
BEHIND_THE_GATEWAY = [f"gateway-{service}" for service in SERVICES]


@contextlib.contextmanager
def provider(name):
    """Run the real one, with all that it needs, and the seed's rows."""
    if name == "orders":
        with running_shop() as shop:
            yield shop.orders
    else:
        with running({"users": Users, "products": Products}[name]) as service:
            yield service


def without_health(contract):
    """What the gateway asks only by itself, and never for a client, is left out."""
    return {**contract, "interactions": [interaction for interaction in contract["interactions"]
                                         if interaction["request"]["target"] != "/health"]}


def failures(contract, port):
    """Return how many interactions a provider fails."""
    case = unittest.FunctionTestCase(lambda: replay(case, contract, port))
    return len(case.run().failures)


class Format(unittest.TestCase):
    def test_there_is_one_for_each_pair_that_speaks(self):
        self.assertEqual(NAMES, sorted([*BEHIND_THE_GATEWAY, "orders-products", "orders-users"]))

    def test_each_says_what_it_should_and_nothing_else(self):
        for name in NAMES:
            contract = load(name)
            self.assertEqual(set(contract), {"consumer", "provider", "interactions"})
            self.assertEqual(f"{contract['consumer']}-{contract['provider']}", name)
            for interaction in contract["interactions"]:
                with self.subTest(name, what=interaction["what"]):
                    self.assertEqual(set(interaction), {"what", "request", "answer"})
                    self.assertEqual(set(whole(interaction["request"])), {"method", "target", "headers", "content"})
                    self.assertEqual(set(whole(interaction["answer"])), {"status", "headers", "content"})
                    self.assertRegex(interaction["what"], r"^[A-Z].*\.$")

    def test_what_fits_is_exact_but_for_what_nobody_needs(self):
        for wanted, found, expected in (
                ({"id": 1}, {"id": 1, "name": "Alice"}, True), ({"id": 1}, {"name": "Alice"}, False),
                ({"id": 1}, [{"id": 1}], False), ({"id": {"a": [1]}}, {"id": {"a": [1], "b": 2}}, True),
                ([{"id": 1}], [{"id": 1, "name": "Alice"}], True), ([1], [1, 2], False), ([1, 2], [1], False),
                (1, True, False), (1, 1.0, False), ("1", 1, False), (1, 2, False), (None, None, True),
                ({"detail": "<any>"}, {"detail": "gone"}, True), ({"detail": "<any>"}, {}, False)):
            with self.subTest(wanted=wanted, found=found):
                self.assertEqual(fits(wanted, found), expected)


class Providers(unittest.TestCase):
    def test_each_keeps_its_contracts(self):
        for name in NAMES:
            contract = load(name)
            with provider(contract["provider"]) as service:
                replay(self, contract, service.server_port)

    def test_one_that_no_longer_does_is_found_out(self):
        contract = load("gateway-users")
        for part, other in (("status", 299), ("headers", {"location": "/elsewhere"}), ("content", {"id": "3"})):
            interactions = [*contract["interactions"]]
            interactions[-1] = {**interactions[-1], "answer": {**interactions[-1]["answer"], part: other}}
            with self.subTest(part), running(Users) as users:
                self.assertEqual(failures({**contract, "interactions": interactions}, users.server_port), 1)


class StubTest(unittest.TestCase):
    def test_it_keeps_the_contract_itself(self):
        for name in NAMES:
            with served(load(name)) as stub:
                replay(self, load(name), stub.server_address[1])
                self.assertEqual(stub.unasked, [])

    def test_what_is_not_in_the_contract_is_an_error_and_fails_the_test(self):
        reservation = b'{"productId": 101, "quantity": 2}'
        json_type = {"Content-Type": "application/json"}
        for request in (
                ("GET", "/reservations/203"), ("DELETE", "/reservations/207"), ("DELETE", "/reservations/203?x"),
                ("PUT", "/reservations/203", {}, reservation), ("PUT", "/reservations/203", json_type, b"{}"),
                ("PUT", "/reservations/203", json_type, b'{"productId": 101, "quantity": true}')):
            with self.subTest(request), self.assertRaisesRegex(AssertionError, "not in the contract with products"):
                with served(load("orders-products")) as stub:
                    self.assertEqual(ask(stub.server_address[1], *request).status, 500)


class OrdersOnStubs(unittest.TestCase):
    def setUp(self):
        self.stubs = [self.enterContext(served(load(f"orders-{name}"))) for name in ("users", "products")]
        self.orders = self.enterContext(running(Orders, **{
            f"{name}_url": [stub.url] for name, stub in zip(("users", "products"), self.stubs, strict=True)}))

    def add(self, user, product, quantity):
        return add_order(self.orders.database, {"userId": user, "productId": product, "quantity": quantity}, None)[0]

    def worker(self, order):
        """One that has read an order, and goes on with it when told."""
        return Saga(self.orders, order, {"x-request-id": "a-worker"})

    def assert_ends(self, order, *expected):
        found = ask(self.orders.server_port, "GET", f"/orders/{order}").json
        self.assertEqual((found["status"], found.get("reason")), expected)

    def test_all_that_the_saga_asks_is_in_the_contracts_and_all_in_the_contracts_is_asked(self):
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
        for fields, reason in (((1, 101, 1000), "<any>"), ((1, 999, 1), "productId: there is no product 999"),
                               ((999, 101, 1), "userId: there is no user 999")):
            order = self.add(*fields)
            self.worker(order).advance()
            self.assert_ends(order, "rejected", reason)
        self.assertEqual([stub.unasked for stub in self.stubs], [[], []])


class GatewayOnStubs(unittest.TestCase):
    def test_what_it_passes_on_and_what_it_asks_itself_is_in_the_contracts(self):
        contracts = {name: load(f"gateway-{name}") for name in SERVICES}
        stubs = {name: self.enterContext(served(contract)) for name, contract in contracts.items()}
        gateway = self.enterContext(running(Gateway, timeout=5.0, **{
            f"{name}_url": [stub.url] for name, stub in stubs.items()}))
        for contract in contracts.values():
            replay(self, without_health(contract), gateway.server_port)
        whole = ask(gateway.server_port, "GET", "/orders/201?expand=user,product").json
        self.assertEqual((whole["user"]["name"], whole["product"]["name"]), ("Alice", "Laptop"))
        health = ask(gateway.server_port, "GET", "/health").json
        self.assertEqual((health["status"], health["services"]), ("ok", dict.fromkeys(SERVICES, "ok")))
        for name, stub in stubs.items():
            self.assertEqual(stub.unasked, [], name)


if __name__ == "__main__":
    unittest.main()
