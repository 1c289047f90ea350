"""How a route, and what a handler says about it, become a part of an OpenAPI document."""
import unittest

from microshop.chassis.answer import Answer
from microshop.chassis.content import ID, Integer, Text, validate
from microshop.chassis.errors import PHRASES, UnprocessableContent
from microshop.chassis.openapi import (
    ERRORS, PAGING, Operation, add_service, make_document, resource, schema_of_body)
from tests.chassis.things import Things, ThingsHandler
from tests.helpers import ask, running
from tests.published import find_difference, find_faults, fits, operations_of

FIELDS = {"name": Text(longest=5), "lives": Integer(least=0, most=9, default=9)}
THING = {"$ref": "#/components/schemas/Thing"}


def published(route: str, operation: Operation, *others: str) -> dict:
    """Return what is published about a route, like "GET /things"; others have the same path."""
    method, path = route.split()
    schemas = {"Thing": resource({"id": ID, **FIELDS})}
    document = make_document("Things", "things", {path: [method, *others]}, {route: operation},
                             schemas)
    return document["paths"][path][method.lower()]


def names_of(described: dict) -> list[str]:
    return [parameter["name"] for parameter in described.get("parameters", [])]


def schema_in(described: dict, status: int) -> dict:
    return described["responses"][str(status)]["content"]["application/json"]["schema"]


class OperationTest(unittest.TestCase):
    def test_a_route_is_published_under_its_path_method_and_name(self):
        operation = Operation("listThings", {200: "Thing"}, summary="Look")
        described = published("GET /things", operation)
        self.assertEqual((described["operationId"], described["summary"], described["tags"]),
                         ("listThings", "Look", ["things"]))
        self.assertEqual(schema_in(described, 200), THING)

    def test_a_route_without_an_operation_is_not_published(self):
        document = make_document("Things", "things", {"/things": ["GET", "PUT"]},
                                 {"GET /things": Operation("listThings", {200: "Thing"})}, {})
        self.assertEqual(list(document["paths"]["/things"]), ["get"])

    def test_an_id_in_the_path_is_a_parameter_and_may_be_404(self):
        described = published("GET /things/{id}", Operation("getThing", {200: "Thing"}))
        self.assertIn("404", described["responses"])
        [parameter] = [each for each in described["parameters"] if each["in"] == "path"]
        self.assertEqual((parameter["name"], parameter["required"], parameter["schema"]),
                         ("id", True, ID.schema()))
        without_id = published("GET /things", Operation("listThings", {200: "Thing"}))
        self.assertNotIn("404", without_id["responses"])

    def test_a_page_has_the_parameters_of_a_page_and_a_link(self):
        described = published("GET /things", Operation("listThings", {200: ["Thing"]}))
        self.assertEqual(schema_in(described, 200), {"type": "array", "items": THING})
        self.assertEqual(names_of(described), ["limit", "after", "ids", "If-None-Match"])
        self.assertIn("Link", described["responses"]["200"]["headers"])
        ids = described["parameters"][2]
        self.assertEqual((ids["style"], ids["explode"]), ("form", False), "ids=1,2 has commas")

    def test_an_answer_in_json_to_get_has_a_tag_with_which_it_may_be_304(self):
        described = published("GET /things/{id}", Operation("getThing", {200: "Thing"}))
        for status in ("200", "304"):
            self.assertIs(described["responses"][status]["headers"]["ETag"]["required"], True)
        text = published("GET /text", Operation("getText", {200: {"type": "string"}},
                                                media_type="text/plain"))
        self.assertNotIn("headers", text["responses"]["200"])
        self.assertNotIn("304", text["responses"])
        self.assertEqual(names_of(text), [])

    def test_a_change_of_what_can_be_fetched_takes_if_match(self):
        for route, operation in (("PUT /things/{id}", Operation("replaceThing", {200: "Thing"})),
                                 ("DELETE /things/{id}", Operation("deleteThing", {204: None}))):
            with self.subTest(route):
                described = published(route, operation, "GET")
                self.assertEqual(names_of(described), ["id", "If-Match"])
                self.assertIn("412", described["responses"])
                blind = published(route, operation)
                self.assertEqual(names_of(blind), ["id"])
                self.assertNotIn("412", blind["responses"])

    def test_only_a_write_may_get_403_or_507(self):
        write = published("DELETE /things/{id}", Operation("deleteThing", {204: None}))
        read = published("GET /things/{id}", Operation("getThing", {200: "Thing"}))
        self.assertLessEqual({"403", "507"}, write["responses"].keys())
        self.assertEqual({"403", "507"} & read["responses"].keys(), set())

    def test_only_an_operation_with_fields_takes_a_body(self):
        operation = Operation("createThing", {201: "Thing"}, FIELDS)
        described = published("POST /things", operation)
        self.assertEqual(described["requestBody"]["content"]["application/json"]["schema"],
                         schema_of_body(FIELDS))
        self.assertLessEqual({"411", "413", "415", "422"}, described["responses"].keys())
        self.assertIn("Location", described["responses"]["201"]["headers"])
        without = published("POST /things", operation._replace(fields=None))
        self.assertNotIn("requestBody", without)
        self.assertNotIn("415", without["responses"])

    def test_errors_and_parameters_of_its_own_are_added(self):
        mood = {**PAGING[0], "name": "mood"}
        described = published("POST /things", Operation("feed", {204: None}, errors=[409],
                                                        parameters=[mood]))
        self.assertIn("409", described["responses"])
        self.assertEqual(names_of(described), ["mood"])

    def test_every_error_is_a_problem_document_under_its_name(self):
        document = make_document("Things", "things", {}, {}, {})
        responses = document["components"]["responses"]
        self.assertEqual(len(responses), len(ERRORS))
        self.assertEqual(responses["NotFound"]["description"], PHRASES[404])
        self.assertEqual({tuple(each["content"]) for each in responses.values()},
                         {("application/problem+json",)})


class SchemaTest(unittest.TestCase):
    """What validates is what is published."""

    def assert_agreed(self, fields, content):
        """Check that the schema and validate() accept or refuse the same."""
        try:
            validate(content, fields)
            is_valid = True
        except UnprocessableContent:
            is_valid = False
        self.assertEqual(fits({}, schema_of_body(fields), content), is_valid,
                         f"validate() says {is_valid} about {content}; the schema does not")

    def test_the_schema_of_a_body_accepts_what_validate_accepts(self):
        for name in ("M", "Mia🐈!", " Mia ", "Mimiaa", "  Mia ", "", " ", "\u3000", "\xa0M", "\x85",
                     "M\x00", "Mi\na", "Mia\n", "\x9fM", "\u2028a", 5, None, ["Mia"], True):
            self.assert_agreed(FIELDS, {"name": name})
        for lives in (0, 9, -1, 10, 5.0, 5.5, "5", None, True, [5], {}):
            self.assert_agreed(FIELDS, {"name": "Mia", "lives": lives})
        for content in ({}, {"lives": 1}, {"name": "Mia", "hat": "red"}, [], "Mia", None):
            self.assert_agreed(FIELDS, content)

    def test_a_field_with_a_default_may_be_left_out_and_the_default_is_published(self):
        schema = schema_of_body(FIELDS)
        self.assertEqual(schema["required"], ["name"])
        self.assertEqual(schema["properties"]["lives"],
                         {"type": "integer", "format": "int64", "minimum": 0, "maximum": 9,
                          "default": 9})
        self.assertNotIn("required", schema_of_body({"lives": FIELDS["lives"]}),
                         "version 3.0 does not allow an empty list here")

    def test_a_resource_may_get_more_members_and_has_all_that_are_not_optional(self):
        schema = resource({"id": ID, "hat": {"type": "string"}}, optional=["hat"])
        self.assertEqual(schema["required"], ["id"])
        self.assertTrue(fits({}, schema, {"id": 1, "hat": "red", "coat": "blue"}))
        self.assertFalse(fits({}, schema, {"hat": "red"}))
        self.assertFalse(fits({}, schema, {"id": 1, "hat": 5}))


class ProcessTest(unittest.TestCase):
    def setUp(self):
        class PublishedHandler(ThingsHandler):
            def greet(self) -> Answer:
                return Answer(b"hello", headers=[("Content-Type", "text/plain")])

            routes = {**ThingsHandler.routes, "/": {"GET": greet}}
            schemas = {"Thing": resource({"id": ID})}
            operations = {
                "GET /": Operation("greet", {200: {"type": "string"}}, media_type="text/plain"),
                "GET /pages": Operation("listPages", {200: ["Thing"]}),
                "GET /things/{id}": Operation("getThing", {200: "Thing"}),
                "DELETE /things/{id}": Operation("deleteThing", {204: None})}

        class PublishedThings(Things):
            title, handler = "Things service", PublishedHandler

        self.server = self.enterContext(running(PublishedThings))
        self.document = self.ask("GET", "/openapi.json").json

    def ask(self, method, target, **headers):
        return ask(self.server.server_port, method, target, headers)

    def test_the_document_is_json_and_has_a_tag(self):
        answer = self.ask("GET", "/openapi.json")
        self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")
        self.assertEqual(answer.json["info"]["title"], "Things service")
        tag = {"If-None-Match": answer.headers["etag"]}
        self.assertEqual(self.ask("GET", "/openapi.json", **tag).status, 304)

    def test_the_document_is_valid_and_has_the_routes_of_every_process(self):
        self.assertEqual(list(find_faults(self.document)), [])
        self.assertLessEqual(
            {"/health", "/health/live", "/openapi.json", "/metrics", "/traces", "/", "/pages"},
            self.document["paths"].keys())

    def test_answers_are_as_published(self):
        for method, path, target in (
                ("GET", "/", "/"), ("GET", "/health", "/health"), ("GET", "/traces", "/traces"),
                ("GET", "/health/live", "/health/live"), ("GET", "/metrics", "/metrics"),
                ("GET", "/openapi.json", "/openapi.json"), ("GET", "/pages", "/pages?limit=2"),
                ("GET", "/pages", "/pages?limit=none"), ("GET", "/things/{id}", "/things/7"),
                ("GET", "/things/{id}", "/things/0"), ("DELETE", "/things/{id}", "/things/7")):
            with self.subTest(f"{method} {target}"):
                answer = self.ask(method, target)
                self.assertEqual(find_difference(self.document, method, path, answer), "")

    def test_a_process_that_drains_answers_a_health_check_as_published(self):
        self.server.draining = True
        answer = self.ask("GET", "/health")
        self.assertEqual(answer.status, 503)
        self.assertEqual(find_difference(self.document, "GET", "/health", answer), "")

    def test_a_refused_health_check_is_as_published_too(self):
        answer = self.ask("GET", "/health", **{"X-Request-Timeout": "0"})
        self.assertEqual((answer.status, answer.headers["content-type"]),
                         (503, "application/problem+json"))
        self.assertEqual(find_difference(self.document, "GET", "/health", answer), "")


class GatewayDocumentTest(unittest.TestCase):
    def setUp(self):
        routes = {"/things": ["GET", "POST"], "/others": ["GET"], "/health": ["GET"]}
        operations = {"GET /things": Operation("listThings", {200: ["Thing"]}),
                      "POST /things": Operation("createThing", {201: "Thing"}, FIELDS),
                      "GET /others": Operation("listOthers", {200: ["Thing"]})}
        service = make_document("Things", "things", routes, operations,
                                {"Thing": resource({"id": ID}), "Health": {"type": "string"}})
        self.gateway = make_document("Gateway", "gateway", {"/health": ["GET"]}, {}, {})
        add_service(self.gateway, "things", service, [{"token": []}])

    def test_only_paths_below_the_name_of_the_service_are_added(self):
        found = [(*operation["tags"], method, path)
                 for method, path, operation in operations_of(self.gateway)]
        self.assertEqual(found, [("gateway", "GET", "/health"), ("things", "GET", "/things"),
                                 ("things", "POST", "/things")])

    def test_schemas_are_added_and_replace_none_of_the_gateways_own(self):
        schemas = self.gateway["components"]["schemas"]
        self.assertEqual(schemas["Thing"], resource({"id": ID}))
        self.assertEqual(schemas["Health"]["type"], "object")

    def test_errors_of_the_gateway_are_added_and_a_token_to_writes(self):
        read, write = (self.gateway["paths"]["/things"][method] for method in ("get", "post"))
        for operation in (read, write):
            self.assertLessEqual({"429", "502", "503", "504"}, operation["responses"].keys())
        self.assertNotIn("security", read)
        self.assertNotIn("401", read["responses"])
        self.assertEqual(write["security"], [{"token": []}])
        self.assertIn("401", write["responses"])


if __name__ == "__main__":
    unittest.main()
