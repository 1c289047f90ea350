"""What the Express demo answered, the shop answers byte for byte: status, content type and body."""
import json
import unittest

from microshop import GATEWAY_PORT, SERVICES
from microshop.gateway import Gateway
from tests.helpers import TOP, ask, running, service_of

CASES = json.loads((TOP / "tests" / "golden.json").read_text())["cases"]


class SeedTest(unittest.TestCase):
    def test_every_recorded_request_gets_the_recorded_answer(self):
        services = {name: self.enterContext(running(service_of(name))) for name in SERVICES}
        urls = {f"{name}_url": [service.url] for name, service in services.items()}
        gateway = self.enterContext(running(Gateway, **urls))
        ports = {GATEWAY_PORT: gateway.server_port,
                 **{SERVICES[name]: service.server_port for name, service in services.items()}}
        for case in CASES:
            with self.subTest(case["path"], port=case["port"], method=case["method"]):
                answer = ask(ports[case["port"]], case["method"], case["path"])
                self.assertEqual(answer.status, case["status"])
                self.assertEqual(answer.headers["content-type"], case["content_type"])
                self.assertEqual(answer.body.decode(), case["body"])
        self.assertEqual(len(CASES), 17, "cases in golden.json")


if __name__ == "__main__":
    unittest.main()
