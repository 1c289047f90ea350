"""The index: each pattern, with its place in the code, its test, its chapter and its exercise.

A place is stored as a name, like "orders:Saga.release", never as the number of a line, which is
found out when it is printed. tests/test_tour.py checks that every name leads somewhere.
"""
import importlib
import inspect
from pathlib import Path
from typing import NamedTuple

from microshop.tour.chapters import number_of

TOP = Path(__file__).parents[2]


class Pattern(NamedTuple):
    """A row of the index."""

    name: str
    place: str                       # a module below microshop, and a name in it; "": in tests
    meaning: str                     # in one sentence
    test: str                        # below tests
    chapter: str = ""                # the function of the chapter that shows it
    exercises: tuple[int, ...] = ()  # their numbers in tests/exercise.py

    def file(self) -> str:
        """Return the file of the place, like "microshop/orders.py"."""
        if not self.place:
            return f"tests/{self.test.partition('.')[0]}.py"
        module = importlib.import_module(f"microshop.{self.place.partition(':')[0]}")
        return Path(inspect.getfile(module)).relative_to(TOP).as_posix()

    def symbol(self) -> str:
        """Return the name within the file; "" for the whole file."""
        return self.place.partition(":")[2]

    def location(self) -> str:
        """Return where it is now, like "microshop/orders.py:196 Saga"."""
        if not self.symbol():
            return self.file()
        module, _, symbol = self.place.partition(":")
        found = importlib.import_module(f"microshop.{module}")
        for name in symbol.split("."):
            found = getattr(found, name)
        return f"{self.file()}:{inspect.getsourcelines(found)[1]} {symbol}"

    def test_command(self) -> str:
        return f"python -m unittest tests.{self.test}"


INDEX = [
    Pattern("API gateway", "gateway:GatewayHandler.forward",
            "Clients talk to one process, which forwards their requests to the services.",
            "test_gateway.ForwardingTest."
            "test_method_and_body_arrive_unchanged", "one_request"),
    Pattern("Correlation id", "chassis.tracing:Trace.headers",
            "A request has one id, which is in the log of every process that works on it.",
            "test_composition.CallTest."
            "test_all_calls_have_the_same_trace_and_correlation_id", "one_request", (1,)),
    Pattern("Distributed tracing", "chassis.tracing:format_span",
            "A record of which process did what for a request, and when.",
            "test_traces.OneTraceTest."
            "test_the_id_of_a_try_is_the_parent_of_what_the_called_service_does", "one_request"),
    Pattern("Database per service", "users:Users",
            "Only one service uses a database; the others have to ask that service.",
            "test_laws.RoomLawTest."
            "test_a_service_uses_only_its_own_tables_and_file", "own_data"),
    Pattern("API composition", "gateway:GatewayHandler.compose",
            "One answer is put together from the answers of several services.",
            "test_composition.MissingTest."
            "test_a_user_is_missing_if_the_service_cannot_be_reached", "own_data", (2,)),
    Pattern("Audit of eventual consistency", "audit:find_violations",
            "A check from outside that the databases agree.",
            "test_audit.ViolationTest."
            "test_each_kind_of_violation_is_found", "own_data"),
    Pattern("Supervisor, restart with backoff", "chassis.child:RestartPolicy",
            "A process that ends is started again, after a pause that doubles.",
            "chassis.test_child.RestartPolicyTest."
            "test_the_pauses_of_a_child_that_crashes_as_soon_as_it_is_ready_double",
            "service_gone", (10,)),
    Pattern("Timeout", "chassis.client:Client.call",
            "A call ends after some seconds, whatever the other side does.",
            "chassis.test_client.DeadlineTest."
            "test_a_deadline_may_shorten_the_timeout_but_not_extend_it", "service_hangs"),
    Pattern("Circuit breaker", "chassis.resilience:CircuitBreaker",
            "An instance that keeps failing gets no calls until a probe succeeds.",
            "chassis.test_resilience.CircuitBreakerTest."
            "test_the_state_follows_from_the_history", "service_hangs", (7, 8)),
    Pattern("Heartbeat", "chassis.server:Heartbeat",
            "A process reports regularly; if it stops reporting, it hangs.",
            "chassis.test_server.SupervisedTest."
            "test_a_supervised_service_sends_heartbeats_and_stops_when_the_supervisor_is_gone"),
    Pattern("Deadline propagation", "chassis.handler:find_deadline",
            "Each call says how much time is left for it.",
            "test_gateway.DeadlineTest."
            "test_the_service_gets_what_is_left_of_the_time_and_a_client_can_only_shorten_it",
            "deadline", (9,)),
    Pattern("Bulkhead", "chassis.resilience:Bulkhead",
            "At most N calls to one service at a time, so that it cannot block the others.",
            "chassis.test_client.BulkheadTest."
            "test_a_service_that_hangs_occupies_a_limited_number_of_calls", "bulkhead", (6,)),
    Pattern("Retry with backoff and jitter", "chassis.client:find_pause",
            "A call that failed is sent again, after a random pause that grows.",
            "chassis.test_client.RetryTest."
            "test_a_pause_is_random_between_zero_and_a_limit_that_doubles"),
    Pattern("Retry budget", "chassis.resilience:RetryBudget",
            "Retries are at most a small share of all calls.",
            "chassis.test_client.RetryTest."
            "test_retries_stop_when_their_budget_is_spent", "", (11,)),
    Pattern("Safe retry", "chassis.client:Call.is_idempotent",
            "A request is sent again only if it does no harm when it is carried out twice.",
            "chassis.test_client.RetryTest."
            "test_a_post_with_an_idempotency_key_is_retried_at_an_idempotent_receiver_only",
            "retries", (5,)),
    Pattern("Idempotency key", "orders:add_order",
            "The client gives its request a name, so that a repeat is recognized.",
            "test_orders.IdempotencyKeyTest."
            "test_a_repeated_key_makes_no_second_order", "crash", (17,)),
    Pattern("Service discovery by configuration", "chassis.config:service_url",
            "Settings say where a process finds the services that it calls.",
            "test_run_all.OpenShopTest."
            "test_orders_finds_the_services_that_an_order_needs"),
    Pattern("Client-side load balancing", "chassis.client:Upstream.choose",
            "The caller spreads its calls over the instances of a service.",
            "chassis.test_client.LoadBalancingTest."
            "test_the_instance_with_the_fewest_requests_in_flight_is_called"),
    Pattern("Saga, orchestrated", "orders:Saga",
            "Small steps in several services, led by one of them, replace a transaction.",
            "test_saga.StatusTest."
            "test_an_order_moves_only_along_the_arrows_of_the_diagram", "saga"),
    Pattern("Compare and set", "orders:move_order",
            "A row is changed only if it still has the value that was read.",
            "test_saga.InterleavingTest."
            "test_a_worker_that_is_too_late_does_not_confirm_a_cancelled_order", "", (19,)),
    Pattern("Compensating transaction", "orders:Saga.release",
            "A step that undoes what an earlier step has done.",
            "test_saga.IndefiniteAnswerTest."
            "test_an_order_is_not_cancelled_before_its_units_are_released", "saga", (18,)),
    Pattern("Durable saga log", "orders:add_order",
            "What has to be done is on disk before it begins, so a crash loses nothing.",
            "test_saga.InterleavingTest."
            "test_an_order_is_in_the_file_before_any_service_is_called", "crash", (16,)),
    Pattern("Eventual consistency", "orders:Saga.advance",
            "The databases may differ for a while, but agree in the end.",
            "test_saga.IndefiniteAnswerTest."
            "test_an_order_whose_reservation_gets_no_answer_stays_pending", "no_answer", (14,)),
    Pattern("Idempotent receiver", "products:reserve",
            "A request that arrives twice is carried out once.",
            "test_products.ReservationTest."
            "test_a_repeated_reserve_takes_the_units_once", "no_answer", (15,)),
    Pattern("Tombstone", "products:release",
            "A marker for something that is gone: a late request cannot bring it back.",
            "test_products.ReservationTest."
            "test_a_reserve_that_arrives_after_its_release_is_refused", "tombstone", (12, 13)),
    Pattern("Optimistic concurrency", "chassis.handler:RouteHelpers.changing",
            "A change is made only if there was no other since the client looked.",
            "test_products.ProductsTest."
            "test_an_outdated_if_match_is_412_and_changes_nothing", "two_editors", (3, 4)),
    Pattern("Load shedding", "chassis.listener:Listener.process_request",
            "What is too much is refused at once, so that the rest stays quick.",
            "chassis.test_listener.FullServiceTest."
            "test_without_an_idle_connection_a_newcomer_gets_503_at_once_and_no_thread",
            "overload", (22,)),
    Pattern("Slow client timeout", "chassis.handler:RequestReader.note_arrival",
            "A client that sends too slowly loses its connection.",
            "chassis.test_handler.SlowClientTest."
            "test_the_time_for_a_body_does_not_begin_again_with_each_byte", "overload", (21,)),
    Pattern("Rate limit", "chassis.admission:RateLimit",
            "A client may send at most N requests in a period.",
            "test_gateway.RateLimitTest."
            "test_health_checks_do_not_count", "overload", (20,)),
    Pattern("Access token", "gateway:GuardedHandler.check_client",
            "Each write must carry a secret that the shop knows.",
            "test_gateway.TokenTest."
            "test_every_write_needs_the_token_whatever_its_path"),
    Pattern("Health check", "chassis.handler:OwnRoutes.health",
            "A URL that tells a monitor whether a process works.",
            "chassis.test_handler.RouteTest."
            "test_only_the_health_of_a_service_that_drains_without_a_successor_is_503"),
    Pattern("Graceful drain", "chassis.server:Service.drain",
            "A process that has to end first finishes the requests that it has begun.",
            "chassis.test_server.DrainTest."
            "test_requests_in_flight_are_finished_and_idle_connections_are_closed",
            "rolling_restart", (23,)),
    Pattern("Rolling restart", "chassis.supervisor:RollingRestart",
            "One process after another is replaced, and no request fails.",
            "test_run_all.RollingRestartTest."
            "test_where_a_new_process_fails_the_old_one_goes_on_and_the_others_stay",
            "rolling_restart", (24,)),
    Pattern("Metrics", "chassis.telemetry:service_families",
            "Counts and durations that a monitoring system collects.",
            "test_metrics.CountTest."
            "test_requests_are_counted_by_method_route_and_status"),
    Pattern("Problem details", "chassis.errors:ServiceError",
            "All errors are JSON documents of one form (RFC 9457).",
            "chassis.test_answer.DescribeTest."
            "test_an_error_is_a_problem_document_with_the_id_of_its_request"),
    Pattern("Published API (OpenAPI)", "chassis.openapi:make_document",
            "A document that programs can read says what the API offers.",
            "test_openapi.ServicesTest."
            "test_each_route_is_published_and_nothing_else"),
    Pattern("Externalized configuration", "chassis.config:read",
            "Settings come from outside: flags and environment variables.",
            "test_run_all.EndedShopTest."
            "test_a_flag_wins_over_its_environment_variable"),
    Pattern("Independent deployment", "kubernetes:source_of",
            "A new version of one service replaces its own processes, and no others.",
            "test_kubernetes.SourceTest."
            "test_a_change_of_one_service_is_a_rollout_of_that_service_alone"),
    Pattern("Container orchestration", "kubernetes:make_manifest",
            "A cluster is told what should run, and keeps it running on many machines.",
            "test_kubernetes.RunTest."
            "test_the_pods_commands_run_a_shop_and_end_in_good_order"),
    Pattern("Schema version", "chassis.database:Database._upgrade",
            "A database file knows its version, and a newer program upgrades it.",
            "chassis.test_database.SchemaTest."
            "test_an_older_file_is_upgraded", "", (26,)),
    Pattern("Microservice chassis", "chassis",
            "The code that every process needs, without any business rule.",
            "test_laws.RoomLawTest."
            "test_the_chassis_does_not_know_what_the_shop_sells", "", (25,)),
    Pattern("Consumer-driven contract", "",
            "Each caller writes down what it needs, and the called service tests that.",
            "test_contracts.ProvidersTest."
            "test_each_provider_keeps_its_contracts"),
    Pattern("Chaos test", "",
            "Faults are injected while clients work, and no order may be lost.",
            "test_chaos.OneRunTest."
            "test_every_order_is_stored_once_and_as_its_client_was_answered_and_the_stock_adds_up"),
]


def rows_of(chapter: str) -> list[Pattern]:
    """Return the rows of a chapter."""
    return [row for row in INDEX if row.chapter == chapter]


def as_text() -> str:
    """Return the index for a terminal."""
    blocks = []
    for row in INDEX:
        also = [f"chapter {number_of(row.chapter)}"] if row.chapter else []
        also += [f"exercise {number}" for number in row.exercises]
        head = f"{row.name} ({', '.join(also)})" if also else row.name
        blocks.append("\n    ".join([head, row.meaning, row.location(), row.test_command()]))
    return "\n\n".join(blocks)


def as_markdown() -> str:
    """Return the index as a table for README.md."""
    lines = ["| pattern | where | tests, in `tests/` | chapter | exercise |",
             "|---|---|---|---|---|"]
    for row in INDEX:
        place = f"`{row.file().removeprefix('microshop/')}`"
        place += f" `{row.symbol()}`" if row.symbol() else ""
        tests = row.test.rpartition(".")[0]
        chapter = number_of(row.chapter) if row.chapter else ""
        exercises = ", ".join(map(str, row.exercises))
        lines.append(f"| {row.name} | {place} | `{tests}` | {chapter} | {exercises} |")
    return "\n".join(lines)
