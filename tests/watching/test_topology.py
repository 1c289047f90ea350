"""What is drawn of processes that call each other, from metrics that were written by hand."""
import unittest

from microshop.watching.topology import draw_topology
from microshop.watching.watch import Node, Silent, Watch
from tests.watching.told import Stage, histogram, metrics

SERVER, CLIENT = "http_server_request_duration_seconds", "http_client_request_duration_seconds"
A, B = "http://gateway:1", "http://users:1"


class TopologyTest(unittest.TestCase):
    """A gateway and users; two rounds, with ten seconds between them."""

    def setUp(self):
        self.stage = Stage()
        self.enterContext(self.stage.patch())
        self.nodes = [Node("gateway", [A]), Node("users", [B])]
        self.watch = Watch(self.nodes)
        self.stage.answer(B, metrics(2, service="users"))
        self.now = 5000.0

    def hear(self, *lines):
        self.answer(metrics(1, *lines))

    def answer(self, *answers):
        self.stage.answer(A, *answers)
        self.watch.ask_all(self.now)
        self.now += 10.0

    def drawn(self):
        return draw_topology(self.nodes, 1100.0)

    def edge(self, source="client", target="gateway"):
        [edge] = [edge for edge in self.drawn()["edges"]
                  if (edge["from"], edge["to"]) == (source, target)]
        return edge

    def upstream(self):
        [upstream] = self.drawn()["upstreams"]
        return upstream


class NodeTest(TopologyTest):
    def test_a_node_shows_its_processes(self):
        for cpu in (2.0, 3.0):
            self.answer(metrics(1, "process_resident_memory_bytes 31457280",
                                f"process_cpu_seconds_total {cpu}", started=1087.5, restarts=3))
        self.assertEqual(self.drawn()["nodes"][0], {
            "name": "gateway", "url": A, "state": "up", "processes": [
                {"pid": 1, "uptime": 12.5, "restarts": 3, "memory": 31457280, "cpu": 0.1}]})

    def test_a_node_that_is_down_shows_how_it_is_silent_and_what_was_known_of_it(self):
        self.hear()
        for _ in range(2):
            self.answer(Silent("refused"))
        node = self.drawn()["nodes"][0]
        self.assertEqual((node["state"], node["silent"], node["processes"][0]["pid"]),
                         ("down", "refused", 1))


class EdgeTest(TopologyTest):
    def test_clients_of_the_first_node(self):
        self.hear(*histogram(SERVER, 'http_route="/users/*",http_response_status_code="200"',
                             le_0_1=0, le_0_5=0))
        self.hear(*histogram(SERVER, 'http_route="/users/*",http_response_status_code="200"',
                             le_0_1=80, le_0_5=80),
                  *histogram(SERVER, 'http_route="/users/*",http_response_status_code="502",'
                             'error_type="502"', le_0_1=0, le_0_5=20))
        edge = self.edge()
        self.assertAlmostEqual(edge.pop("p50"), 0.0625)
        self.assertAlmostEqual(edge.pop("p99"), 0.48)
        self.assertEqual(edge, {"from": "client", "to": "gateway", "asked": 10.0, "tried": 10.0,
                                "errors": 0.2})

    def test_calls_that_all_took_about_as_long_have_their_mean_as_p50_and_p99(self):
        labels = 'http_route="/users/*",http_response_status_code="504"'
        self.hear()
        self.hear(*histogram(SERVER, labels, le_2_5=0, le_5=5),
                  f"{SERVER}_sum{{{labels}}} 24.5")
        self.assertEqual((self.edge()["p50"], self.edge()["p99"]), (4.9, 4.9))

    def test_errors_of_clients_and_clients_that_went_away_are_no_errors_of_the_shop(self):
        lines = [histogram(SERVER, f'http_response_status_code="{status}",error_type="x"', le_1=10)
                 for status in (404, 499)]
        self.hear()
        self.hear(*lines[0], *lines[1])
        self.assertEqual((self.edge()["tried"], self.edge()["errors"]), (2.0, 0.0))

    def test_health_checks_are_left_out(self):
        self.hear()
        self.hear(*histogram(SERVER, 'http_route="/health"', le_1=100),
                  *histogram(SERVER, 'http_route="/health/live"', le_1=100))
        edge = self.edge()
        self.assertEqual((edge["tried"], edge["p50"]), (0, None))

    def test_without_traffic_there_are_no_percentiles(self):
        self.hear()
        self.hear()
        self.assertEqual(self.edge(), {"from": "client", "to": "gateway", "asked": 0, "tried": 0,
                                       "errors": 0.0, "p50": None, "p99": None})

    def test_a_call_that_is_retried_is_asked_once_and_tried_several_times(self):
        at = 'peer_service="users",server_address="a",server_port="1"'
        self.hear('microshop_calls_total{upstream="users"} 100')
        self.hear('microshop_calls_total{upstream="users"} 200',
                  *histogram(CLIENT, f'{at},http_response_status_code="200"', le_1=90),
                  *histogram(CLIENT, f'{at},http_response_status_code="404"', le_1=10),
                  *histogram(CLIENT, f'{at},http_response_status_code="500",error_type="500"',
                             le_1=10),
                  *histogram(CLIENT, f'{at},error_type="refused"', le_1=40),
                  *histogram(CLIENT, 'peer_service="others"', le_1=1000))
        edge = self.edge("gateway", "users")
        self.assertEqual((edge["asked"], edge["tried"]), (10.0, 15.0))
        self.assertAlmostEqual(edge["errors"], 50 / 150)

    def test_there_is_an_edge_for_each_call_direction_that_a_process_has_and_no_other(self):
        self.hear('microshop_calls_total{upstream="users"} 0',
                  'microshop_calls_total{upstream="strangers"} 0')
        self.stage.answer(B, metrics(2, 'microshop_calls_total{upstream="users"} 0'))
        self.hear('microshop_calls_total{upstream="users"} 0')
        self.assertEqual([(edge["from"], edge["to"]) for edge in self.drawn()["edges"]],
                         [("client", "gateway"), ("gateway", "users"), ("users", "users")])


class GuardTest(TopologyTest):
    CALLS = 'microshop_calls_total{upstream="users"} 0'

    def breaker(self, state, seconds, server="http://127.0.0.1:3001"):
        at = f'upstream="users",server="{server}"'
        return [*(f'microshop_breaker_state{{{at},state="{name}"}} {int(name == state)}'
                  for name in ("closed", "open", "half-open")),
                f"microshop_breaker_open_seconds{{{at}}} {seconds}"]

    def test_bulkhead_retry_budget_and_rejections(self):
        lines = ["microshop_bulkhead_in_use 3", "microshop_bulkhead_limit 64",
                 "microshop_retry_budget_used 1", "microshop_retry_budget_limit 7.5"]
        lines = [line.replace(" ", '{upstream="users"} ') for line in lines]
        rejected = 'microshop_rejected_calls_total{upstream="users",reason="breaker"} '
        self.hear(self.CALLS, rejected + "10")
        self.hear(self.CALLS, rejected + "30", *lines)
        self.assertEqual(self.upstream(), {
            "from": "gateway", "to": "users", "in_flight": 3, "limit": 64, "retries": 1,
            "retry_limit": 7, "rejected": {"breaker": 2.0, "bulkhead": 0}, "instances": []})

    def test_each_instance_shows_the_state_of_its_breaker(self):
        self.hear(self.CALLS, *self.breaker("open", 2.5, "http://b:2"),
                  *self.breaker("closed", 0, "http://a:1"),
                  *self.breaker("half-open", 0, "http://c:3"))
        self.assertEqual(self.upstream()["instances"], [
            {"server": "http://a:1", "state": "closed", "seconds": 0},
            {"server": "http://b:2", "state": "open", "seconds": 2.5},
            {"server": "http://c:3", "state": "half-open", "seconds": 0}])

    def test_of_several_gateways_the_breaker_in_the_worst_state_is_shown(self):
        self.answer(metrics(1, self.CALLS, *self.breaker("open", 2.5)))
        self.answer(metrics(3, self.CALLS, *self.breaker("open", 3.5), started=999.0))
        self.assertEqual(self.upstream()["instances"], [
            {"server": "http://127.0.0.1:3001", "state": "open", "seconds": 3.5}])
        self.answer(metrics(1, self.CALLS, *self.breaker("half-open", 0)),
                    metrics(3, self.CALLS, *self.breaker("closed", 0), started=999.0))
        self.assertEqual(self.upstream()["instances"][0]["state"], "half-open")


if __name__ == "__main__":
    unittest.main()
