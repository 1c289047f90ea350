"""What the shop publishes about itself is valid, complete, and true of the running processes."""
import contextlib
import json
import re
import unittest
from itertools import chain

from microshop import SERVICES
from microshop.chassis import content, openapi
from microshop.chassis.admission import Rate
from microshop.gateway import EXPANSIONS, Gateway, GatewayHandler
from tests.helpers import NOBODY, ask, running, running_shop, service_of, upstream
from tests.published import find_difference, find_faults, fits, operations_of
from tests.test_composition import Stub, always, response

NAMES_IN_CLIENTS = {
    "listUsers", "createUser", "getUser", "replaceUser", "deleteUser", "listProducts",
    "createProduct", "getProduct", "replaceProduct", "deleteProduct", "listOrders", "placeOrder",
    "getOrder", "cancelOrder", "greet", "getHealth", "getLiveness", "getApi", "getMetrics",
    "getTraces"}
MOST = content.MAX_INTEGER
BODIES = {  # for each operation with a body: one that is accepted
    "createUser": {"name": "Carol"}, "replaceUser": {"name": "Carol"},
    "createProduct": {"name": "Lamp", "stock": 5}, "replaceProduct": {"name": "Lamp", "stock": 5},
    "placeOrder": {"userId": 1, "productId": 101, "quantity": 1},
    "reserve": {"productId": 101, "quantity": 1}}
TARGETS = {"/users/{id}": "/users/1", "/products/{id}": "/products/101",
           "/reservations/{id}": "/reservations/4711"}
REFUSED = re.compile("must be an integer|must be text|is not a known field")
OF_INTEGERS = (-1, 0, 1, 1.5, 2.0, MOST, MOST + 1, True, "1", None, [], {})
OF_TEXTS = ("", " ", "Z", "x" * 200, "x" * 201, "🐈" * 200, "🐈" * 201, " x".ljust(200),
            " x".ljust(201), "a\tb", "a\n", "\x85a", "a\x9f", "\u2028a", 5, True, None, [], {})


def routes_of(handler: type) -> set[str]:
    """Return the routes of a handler, each like "GET /users"."""
    return {f"{method} {path}" for path, methods in handler.all_routes.items()
            for method in methods}


def published_routes(document: dict) -> set[str]:
    return {f"{method} {path}" for method, path, _ in operations_of(document)}


@contextlib.contextmanager
def running_gateway(shop, **settings):
    """Run a gateway in front of a shop, and of the services that are not part of it."""
    with contextlib.ExitStack() as stack:
        servers = {name: getattr(shop, name, None) or stack.enter_context(running(service_of(name)))
                   for name in SERVICES}
        urls = {f"{name}_url": [server.url] for name, server in servers.items()}
        with running(Gateway, **{**urls, **settings}) as gateway:
            yield gateway


def document_of(server) -> dict:
    answer = ask(server.server_port, "GET", "/openapi.json")
    assert answer.status == 200, f"{server.name} has no document: {answer}"
    return answer.json


class ServicesTest(unittest.TestCase):
    """The document of each service: other tests know the three by name, these also new ones."""

    def setUp(self):
        self.servers = [self.enterContext(running(service_of(name))) for name in SERVICES]

    def test_each_document_is_valid(self):
        for server in self.servers:
            self.assertEqual(list(find_faults(document_of(server))), [], server.name)

    def test_each_route_is_published_and_nothing_else(self):
        for server in self.servers:
            with self.subTest(server.name):
                self.assertEqual(published_routes(document_of(server)), routes_of(server.handler),
                                 "`operations` must have an entry for each route of `routes`")
                self.assertLessEqual(server.handler.operations.keys(), routes_of(server.handler),
                                     "`operations` has entries for routes that do not exist")

    def test_whatever_takes_a_body_publishes_it(self):
        for server in self.servers:
            for method, path, operation in operations_of(document_of(server)):
                if method in ("POST", "PUT") and "requestBody" not in operation:
                    answer = ask(server.server_port, method, path.replace("{id}", "9"))
                    self.assertNotIn(answer.status, (411, 415, 422),
                                     f"{method} {path} of {server.name} wants a body: its entry in "
                                     "`operations` must have the fields")

    def test_names_of_operations_and_schemas_are_unique_in_the_shop(self):
        names = [operation.name for server in self.servers
                 for operation in server.handler.operations.values()]
        names += chain(openapi.OWN_SCHEMAS, *(server.handler.schemas for server in self.servers))
        self.assertEqual(sorted(names), sorted(set(names)))

    def test_null_is_used_nowhere_so_that_version_3_0_is_enough(self):
        for server in self.servers:
            self.assertNotIn('"null"', json.dumps(document_of(server)), server.name)


class BodiesTest(unittest.TestCase):
    """The limits that are published are those of the running services."""

    def assert_agreed(self, shop, method, target, schema, body):
        """Check that a body is refused for its fields if, and only if, it does not fit."""
        answer = shop.ask(method, target, body)
        detail = answer.json["errors"][0]["detail"] if answer.status == 422 else ""
        self.assertEqual(fits({}, schema, body), not REFUSED.match(detail),
                         f"{method} {target} {body} is answered with {answer.status} {answer.body}")

    def test_bodies_are_refused_if_and_only_if_they_are_outside_what_is_published(self):
        with running_shop() as shop:
            for server in shop:
                document = document_of(server)
                for method, path, operation in operations_of(document):
                    if "requestBody" not in operation:
                        continue
                    schema = operation["requestBody"]["content"]["application/json"]["schema"]
                    target = TARGETS.get(path, path)
                    for body in bodies_around(schema, BODIES[operation["operationId"]]):
                        with self.subTest(operation["operationId"], body=str(body)[:60]):
                            self.assert_agreed(shop, method, target, schema, body)
            shop.ask("DELETE", TARGETS["/reservations/{id}"])  # else the audit finds it

    def test_parameters_are_refused_if_and_only_if_they_are_outside_what_is_published(self):
        with running_shop() as shop:
            document = document_of(shop.orders)
            described = {parameter["name"]: parameter["schema"]
                         for parameter in document["paths"]["/orders"]["get"]["parameters"]}
            for name, values in (
                    ("limit", (-1, 0, 1, 1000, 1001)), ("after", (-1, 0, MOST, MOST + 1)),
                    ("status", ("pending", "rejected", "lost", "")),
                    ("ids", ([], [0], [1], [1, MOST], [MOST + 1], [1] * 1000, [1] * 1001))):
                for value in values:
                    text = ",".join(map(str, value)) if isinstance(value, list) else value
                    with self.subTest(f"{name}={str(text)[:60]}"):
                        answer = shop.ask("GET", f"/orders?{name}={text}")
                        self.assertEqual(answer.status == 200,
                                         fits(document, described[name], value), answer.body)

    def test_keys_are_refused_if_and_only_if_they_are_outside_what_is_published(self):
        with running_shop() as shop:
            document = document_of(shop.orders)
            [key] = document["paths"]["/orders"]["post"]["parameters"]
            for value in ("k", "a key", "!~", "k" * 255, "k" * 256, "", "\xe9", "a\tb"):
                with self.subTest(value[:20]):
                    answer = shop.ask("POST", "/orders", {"userId": 1, "productId": 101,
                                                          "quantity": 1}, Idempotency_Key=value)
                    self.assertEqual(answer.status == 201, fits(document, key["schema"], value),
                                     answer.body)


def bodies_around(schema, good):
    """Yield a body that is accepted, and others that differ from it in one field."""
    yield good
    for name, field in schema["properties"].items():
        for value in OF_TEXTS if field["type"] == "string" else OF_INTEGERS:
            yield {**good, name: value}
        yield {key: value for key, value in good.items() if key != name}
    yield {**good, "hat": "red"}


class GatewayTest(unittest.TestCase):
    """The document of the gateway: the API of the whole shop."""

    def setUp(self):
        self.shop = self.enterContext(running_shop())
        self.gateway = self.enterContext(running_gateway(self.shop))
        self.document = document_of(self.gateway)

    def ask(self, method, target, value=None, **headers):
        headers = {name.replace("_", "-"): text for name, text in headers.items()}
        if value is None:
            return ask(self.gateway.server_port, method, target, headers)
        return ask(self.gateway.server_port, method, target,
                   {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def assert_published(self, method, path, answer, *statuses):
        self.assertIn(answer.status, statuses, answer.body)
        self.assertEqual(find_difference(self.document, method, path, answer), "")

    def test_the_document_is_valid(self):
        self.assertEqual(list(find_faults(self.document)), [])

    def test_clients_get_good_names_for_their_methods(self):
        names = {operation["operationId"] for _, _, operation in operations_of(self.document)}
        self.assertLessEqual(NAMES_IN_CLIENTS, names)

    def test_the_public_routes_of_all_processes_are_published_and_no_others(self):
        expected = routes_of(GatewayHandler) - {"GET /database"}  # it has none
        for name in SERVICES:
            expected |= {route for route in routes_of(service_of(name).handler)
                         if route.split("/")[1] == name}
        self.assertEqual(published_routes(self.document), expected)

    def test_reservations_are_published_by_their_service_only(self):
        self.assertIn("/reservations/{id}", document_of(self.shop.products)["paths"])
        self.assertNotIn("reserv", json.dumps(self.document))

    def test_a_copy_of_a_database_is_answered_by_its_service_and_not_by_the_gateway(self):
        for server in self.shop:
            self.assertEqual(ask(server.server_port, "GET", "/database").status, 200, server.name)
            self.assertIn("/database", document_of(server)["paths"], server.name)
        self.assertNotIn("GET /database", published_routes(self.document))
        for path in ("/database", "/orders/database"):
            self.assertEqual(self.ask("GET", path).status, 404, f"GET {path} of the gateway")

    def test_operations_have_the_name_of_their_process_as_a_tag(self):
        tags = {path: operation["tags"] for _, path, operation in operations_of(self.document)}
        self.assertEqual((tags["/orders/{id}/cancel"], tags["/health"]), (["orders"], ["gateway"]))

    def test_answers_are_as_published(self):
        lamp = {"name": "Lamp", "stock": 5}
        for method, path, target, value, status in (
                ("GET", "/", "/", None, 200), ("GET", "/health", "/health", None, 200),
                ("GET", "/health/live", "/health/live", None, 200),
                ("GET", "/openapi.json", "/openapi.json", None, 200),
                ("GET", "/metrics", "/metrics", None, 200),
                ("GET", "/traces", "/traces", None, 200),
                ("GET", "/users", "/users?limit=1", None, 200),
                ("GET", "/users", "/users?limit=0", None, 400),
                ("GET", "/users/{id}", "/users/1", None, 200),
                ("GET", "/users/{id}", "/users/9", None, 404),
                ("POST", "/users", "/users", {"name": "Carol"}, 201),
                ("POST", "/users", "/users", {"name": ""}, 422),
                ("PUT", "/users/{id}", "/users/3", {"name": "Cora"}, 200),
                ("DELETE", "/users/{id}", "/users/3", None, 204),
                ("GET", "/products", "/products", None, 200),
                ("POST", "/products", "/products", {"name": "Lamp"}, 201),
                ("PUT", "/products/{id}", "/products/103", lamp, 200),
                ("GET", "/products/{id}", "/products/103", None, 200),
                ("DELETE", "/products/{id}", "/products/101", None, 409),
                ("DELETE", "/products/{id}", "/products/103", None, 204),
                ("GET", "/orders", "/orders", None, 200),
                ("GET", "/orders", "/orders?expand=user,product", None, 200),
                ("GET", "/orders", "/orders?expand=hat", None, 400),
                ("GET", "/orders/{id}", "/orders/201?expand=user", None, 200),
                ("POST", "/orders", "/orders", {"userId": 1, "productId": 101}, 201),
                ("POST", "/orders", "/orders", {"userId": 1, "productId": 999}, 422),
                ("POST", "/orders", "/orders",
                 {"userId": 1, "productId": 101, "quantity": 999}, 409),
                ("GET", "/orders/{id}", "/orders/204", None, 200),
                ("POST", "/orders/{id}/cancel", "/orders/203/cancel", None, 200),
                ("POST", "/orders/{id}/cancel", "/orders/204/cancel", None, 409)):
            with self.subTest(f"{method} {target}", value=value):
                self.assert_published(method, path, self.ask(method, target, value), status)

    def test_conditional_requests_are_answered_as_published(self):
        for path, target in (("/users", "/users"), ("/users/{id}", "/users/1")):
            tag = self.ask("GET", target).headers["etag"]
            self.assert_published("GET", path, self.ask("GET", target, If_None_Match=tag), 304)
        for method, value in (("PUT", {"name": "Ann"}), ("DELETE", None)):
            answer = self.ask(method, "/users/1", value, If_Match='"old"')
            self.assert_published(method, "/users/{id}", answer, 412)

    def test_bodies_that_are_not_json_are_refused_as_published(self):
        for body, headers, status in ((b"{", {"Content-Type": "application/json"}, 400),
                                      (b"{}", {"Content-Type": "text/plain"}, 415)):
            answer = ask(self.gateway.server_port, "POST", "/users", headers, body)
            self.assert_published("POST", "/users", answer, status)

    def test_a_composed_order_is_as_published_also_if_a_part_is_missing(self):
        order = self.ask("POST", "/orders", {"userId": 1, "productId": 101}).json["id"]
        self.ask("DELETE", "/users/1")
        answer = self.ask("GET", f"/orders/{order}?expand=user,product")
        self.assertIsNone(answer.json["user"])
        self.assert_published("GET", "/orders/{id}", answer, 200)
        schema = self.document["components"]["schemas"]["Order"]
        for wrong in ({"user": {}}, {"product": 5}, {"missing": [{}]}):
            self.assertFalse(fits(self.document, schema, {**answer.json, **wrong}), wrong)

    def test_expand_is_published_for_gets_that_compose_and_no_others(self):
        for method, path, operation in operations_of(self.document):
            found = [parameter["schema"]["items"]["enum"]
                     for parameter in operation.get("parameters", [])
                     if parameter["name"] == "expand"]
            composes = method == "GET" and path.split("/")[1] in EXPANSIONS
            self.assertEqual(found, [["user", "product"]] if composes else [], f"{method} {path}")

    def test_an_order_that_stays_pending_is_answered_as_published(self):
        with (running_shop(products_url=[NOBODY]) as shop, running_gateway(shop) as gateway):
            answer = ask(gateway.server_port, "POST", "/orders",
                         {"Content-Type": "application/json"}, b'{"userId":1,"productId":101}')
            self.assert_published("POST", "/orders", answer, 202)

    def test_errors_of_the_gateway_itself_are_as_published(self):
        with running_gateway(self.shop, users_url=[NOBODY]) as gateway:
            for path in ("/users", "/openapi.json"):
                answer = ask(gateway.server_port, "GET", path)
                self.assert_published("GET", path, answer, 502)
        with running_gateway(self.shop, rate=Rate(1, 60)) as gateway:
            for path, target, status in (
                    ("/users/{id}", "/users/1", 200), ("/users/{id}", "/users/1", 429),
                    ("/", "/", 429), ("/openapi.json", "/openapi.json", 429),
                    ("/health", "/health", 200)):
                answer = ask(gateway.server_port, "GET", target)
                self.assert_published("GET", path, answer, status)


class SecurityTest(unittest.TestCase):
    def test_writes_need_a_token_exactly_if_the_gateway_has_one(self):
        for token, needed in (("", [{"token": []}, {}]), ("s3cret", [{"token": []}])):
            with running_shop() as shop, running_gateway(shop, token=token) as gateway:
                document = document_of(gateway)
                for method, path, operation in operations_of(document):
                    with self.subTest(f"{method} {path}", token=token):
                        expected = None if method == "GET" else needed
                        self.assertEqual(operation.get("security"), expected)
                answer = ask(gateway.server_port, "POST", "/users")
                self.assertEqual(answer.status, 401 if token else 415)
                self.assertEqual(find_difference(document, "POST", "/users", answer), "")

    def test_metrics_are_refused_to_others_as_published(self):
        with running_shop() as shop, running_gateway(shop, token="s3cret") as gateway:
            document = document_of(gateway)
            for path in ("/metrics", "/traces"):
                answer = ask(gateway.server_port, "GET", path, {"X-Forwarded-For": "192.0.2.1"})
                self.assertEqual(answer.status, 403)
                self.assertEqual(find_difference(document, "GET", path, answer), "")


class ServiceAwayTest(unittest.TestCase):
    """Without the document of a service, there is none of the shop."""

    def assert_named(self, status, **urls):
        with running_shop() as shop, running_gateway(shop, **urls) as gateway:
            answer = ask(gateway.server_port, "GET", "/openapi.json")
            self.assertEqual((answer.status, answer.json.get("service")), (status, "products"))

    def test_a_service_that_is_away_is_named_in_a_502(self):
        self.assert_named(502, products_url=[NOBODY])

    def test_a_document_that_is_invalid_is_a_502(self):
        for document in ({}, [], [{}, {}], 5, {"paths": 5}, {"paths": {"/products": {"get": 5}}},
                         {"paths": {}}, {"paths": {}, "components": {}},
                         {"paths": {"/products": {"get": {}}}, "components": {"schemas": {}}},
                         response(b"{")):
            with self.subTest(document), upstream(Stub(always(document))) as url:
                self.assert_named(502, products_url=[url])

    def test_a_schema_without_properties_is_published_as_it_is(self):
        with running_shop() as shop:
            document = ask(shop.products.server_port, "GET", "/openapi.json").json
            document["components"]["schemas"]["Colour"] = {"type": "string"}
            with (upstream(Stub(always(document))) as url,
                  running_gateway(shop, products_url=[url]) as gateway):
                answer = ask(gateway.server_port, "GET", "/openapi.json")
        self.assertEqual(answer.status, 200, "products has published a schema of a string, Colour")
        self.assertEqual(answer.json["components"]["schemas"]["Colour"], {"type": "string"})

    def test_another_error_of_the_service_is_passed_on(self):
        with (upstream(Stub(always(response(b"{}", 503)))) as url, running_shop() as shop,
              running_gateway(shop, products_url=[url]) as gateway):
            self.assertEqual(ask(gateway.server_port, "GET", "/openapi.json").status, 503)


if __name__ == "__main__":
    unittest.main()
