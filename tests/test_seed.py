"""Whatever the Express seed answered, the shop answers byte for byte: status, content type and body."""
import json
import unittest

from microshop.gateway import Gateway
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests.helpers import TOP, ask, running

CASES = json.loads((TOP / "tests" / "golden.json").read_text())["cases"]


class SeedTest(unittest.TestCase):
    def test_every_recorded_answer_is_given(self):
        with running(Users) as users, running(Products) as products, running(Orders) as orders:
            services = {"users": users, "products": products, "orders": orders}
            urls = {f"{name}_url": [f"http://127.0.0.1:{service.server_port}"] for name, service in services.items()}
            with running(Gateway, timeout=5.0, **urls) as gateway:
                ports = {3000: gateway, 3001: users, 3002: products, 3003: orders}
                for case in CASES:
                    with self.subTest(case["path"], port=case["port"], method=case["method"]):
                        answer = ask(ports[case["port"]].server_port, case["method"], case["path"])
                        self.assertEqual(answer.status, case["status"])
                        self.assertEqual(answer.headers["content-type"], case["content_type"])
                        self.assertEqual(answer.body.decode(), case["body"])
        self.assertEqual(len(CASES), 17)


if __name__ == "__main__":
    unittest.main()
