"""Exercises that go with the chapters in microshop/tour/first_steps.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
    Exercise(
        title="Two logs, two ids",
        pattern="Correlation id",
        minutes=5,
        file="chassis/tracing.py",
        old='''\
        headers = {"x-request-id": self.request_id,
                   "traceparent": f"00-{self.trace_id}-{span_id}-{self.flags:02x}"}
''',
        new='''\
        headers = {"traceparent": f"00-{self.trace_id}-{span_id}-{self.flags:02x}"}
''',
        test="test_composition.CallTest"
             ".test_all_calls_have_the_same_trace_and_correlation_id",
        chapter="one_request",
        story="""
            A customer calls: a page of hers took long to appear, and she reads you the
            X-Request-Id of the answer. You search all logs for it. The gateway has one line with
            this id. The services have none, although they have certainly worked on the request:
            each has logged it under an id of its own. With a thousand requests a second, you will
            not find the right line.
            """,
        hints=(
            "Each request that the gateway sends to a service has headers that tell the service "
            "which request this is about. Compare what arrives at a service with what you expect.",
            "These headers come from Trace.headers() in microshop/chassis/tracing.py. How does a "
            "service know the trace, and how does it know the id of the request?",
            "A service takes over an id that comes in X-Request-Id (read_request() in "
            "microshop/chassis/handler.py). So headers() has to add `x-request-id`: the "
            "request_id.",
        )),
    Exercise(
        title="All or nothing",
        pattern="API composition",
        minutes=15,
        file="gateway.py",
        old='''\
        except UpstreamError as error:
            future.set_result(error)
        except Exception as error:  # raised again below, in the thread that waits
''',
        new='''\
        except Exception as error:  # raised again below, in the thread that waits
''',
        test="test_composition.MissingTest"
             ".test_a_user_is_missing_if_the_service_cannot_be_reached",
        chapter="own_data",
        story="""
            The page with a customer's orders shows the name of the customer in a corner. This
            morning the users service was down for a minute. For that minute, no customer could
            see any order: the whole page was an error, although orders and products were fine.
            Even the gateway's health check was an error, instead of telling which service was
            down.
            """,
        hints=(
            "The gateway puts together what several services answer (API composition). If one of "
            "them fails, only its part may be missing. Find where the gateway calls them all.",
            "That is get_all() in microshop/gateway.py. It promises to return replies or errors. "
            "Which errors does it return, and which does it raise?",
            "client.call() raises an UpstreamError if a service fails. In get(), that error is a "
            "result, like a reply: future.set_result(error). All others are bugs, to be raised.",
        )),
    Exercise(
        title="The lost count",
        pattern="Optimistic concurrency",
        minutes=10,
        file="gateway.py",
        old='''\
    "host", "content-length", "expect", "origin", "forwarded", "x-real-ip", "x-request-id",
    "x-request-timeout", "traceparent", "tracestate"}
''',
        new='''\
    "host", "content-length", "expect", "if-match", "origin", "forwarded", "x-real-ip",
    "x-request-id", "x-request-timeout", "traceparent", "tracestate"}
''',
        test="test_gateway.RealServiceTest"
             ".test_writes_are_forwarded_with_their_conditions_and_locations",
        chapter="two_editors",
        story="""
            Two editors change the same product, and one of them loses his work: the later write
            silently replaces the earlier one. Their program sends If-Match with each PUT, as your
            documentation says. You try it with curl on the port of the products service: 412, as
            it should be. The developers of the program swear that they have never seen a 412.
            """,
        hints=(
            "It works directly at the service, and not for clients. What is between the two?",
            "The gateway does not forward every header. Which does it leave out on purpose, and "
            "why? Look at the sets at the top of microshop/gateway.py.",
            "If-Match is a condition of the client for the service that owns the resource. It is "
            "no business of the gateway, so it must not be in SET_BY_GATEWAY.",
        )),
    Exercise(
        title="Ten winners",
        pattern="Optimistic concurrency",
        minutes=25,
        file="chassis/handler.py",
        old='''\
            check_preconditions(self.context(), entity_tag(encode(item).encode()))
            yield transaction
''',
        new='''\
        check_preconditions(self.context(), entity_tag(encode(item).encode()))
        with self.server.database.transaction() as transaction:
            yield transaction
''',
        test="test_users.UsersTest"
             ".test_of_ten_simultaneous_editors_with_the_same_etag_exactly_one_succeeds",
        related="two_editors",
        story="""
            If-Match works: a client that is a second late gets 412. But on a busy day, when
            several clients write at the same moment, some updates are lost all the same. Each of
            these clients got 200. Nothing in the logs looks wrong, and at your desk you cannot
            make it happen: it needs two requests within less than a millisecond.
            """,
        hints=(
            "Two requests pass the same check before either of them writes. This is called a "
            "check-then-act race. Find the place where If-Match is compared before a write.",
            "That is changing() in microshop/chassis/handler.py. What can another request do "
            "between the moment when the item is read and the moment when it is written?",
            "A transaction keeps other writers out while it lasts. So one and the same "
            "transaction has to read the item, check the condition, and write.",
        )),
]
