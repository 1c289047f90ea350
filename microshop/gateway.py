"""The API gateway: the front door. Owns nothing.

A path's first segment names the service that it is for; that is all that is known here about any.
Law: the gateway knows prefixes, not business.
"""
import re
from argparse import Namespace
from threading import Thread

from microshop.chassis import config
from microshop.chassis.client import Client, Upstream
from microshop.chassis.errors import ServiceError
from microshop.chassis.server import Answer, Handler, Service

SERVICES = {"users": "http://127.0.0.1:3001", "products": "http://127.0.0.1:3002", "orders": "http://127.0.0.1:3003"}
KEEPS_KEYS = {"orders"}  # who honours an Idempotency-Key: a POST with one may be sent twice
HEALTH_TIME = 1.0  # seconds for a service to tell how it is

# What concerns one hop alone is not passed on: RFC 9110 7.6.1, and the framing, which each hop makes anew.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te",
              "trailer", "transfer-encoding", "upgrade"}
# What the gateway itself says to a service; a client's word for it does not count.
OWN = {"host", "content-length", "expect", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto",
       "x-request-id", "traceparent", "tracestate"}
NOT_SENT = HOP_BY_HOP | OWN
NOT_ANSWERED = HOP_BY_HOP | {"x-request-id", "content-length"}


def via(version: str) -> str:
    return f"{version.removeprefix('HTTP/')} microshop"


class GatewayHandler(Handler):
    server: "Gateway"

    def dispatch(self) -> Answer:
        upstream = self.server.upstreams.get(re.split("[/?]", self.path)[1])
        return self.forward(upstream) if upstream else super().dispatch()

    def forward(self, upstream: Upstream) -> Answer:
        """Pass the request on and return what the service answers. Raises BadGateway, GatewayTimeout."""
        named = self.headers.tokens("connection")
        headers = {name: value for name, value in self.headers.items() if name not in NOT_SENT and name not in named}
        headers["via"] = ", ".join(filter(None, (headers.get("via"), via(self.request_version))))
        headers["x-forwarded-for"] = self.client_address[0]
        headers["x-forwarded-proto"] = "http"
        if "host" in self.headers:
            headers["x-forwarded-host"] = self.headers["host"]
        headers.update(self.trace())
        reply = self.server.client.call(upstream, self.command, self.path, headers, self.body)
        named = reply.fields.tokens("connection")
        passed = [(name, value) for name, value in reply.fields.pairs
                  if (key := name.lower()) not in NOT_ANSWERED and key not in named]
        if self.command == "HEAD" and "content-length" in reply.fields and reply.status != 204:  # what GET would send
            passed.append(("Content-Length", reply.fields["content-length"]))
        return Answer(reply.body, reply.status, [*passed, ("Via", via(reply.version))])

    def greet(self) -> Answer:
        return Answer(b"API Gateway", headers=[("Content-Type", "text/html; charset=utf-8")])

    def health(self) -> Answer:
        """Tell how the gateway is and each service behind it."""
        states = dict.fromkeys(self.server.upstreams, "away")
        threads = [Thread(target=self.ask_health, args=(upstream, states))
                   for upstream in self.server.upstreams.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answer = super().health()
        if answer.status == 200 and set(states.values()) != {"ok"}:
            answer.body["status"] = "degraded"
        return answer._replace(body={**answer.body, "services": states})

    def ask_health(self, upstream: Upstream, states: dict[str, str]) -> None:
        try:
            reply = self.server.client.call(upstream, "GET", "/health", self.trace(), timeout=HEALTH_TIME)
        except ServiceError:
            return
        states[upstream.name] = {200: "ok", 503: "draining"}.get(reply.status, "away")

    routes = {"/": {"GET": greet}}


class Gateway(Service):
    name, title, port = "gateway", "API Gateway", 3000
    handler = GatewayHandler
    options = [
        config.HOST, config.QUIET,
        config.Setting("timeout", config.seconds, "5", "seconds for a service to answer"),
        config.Setting("reuse-port", config.switch, "", "share the port with other gateway processes"),
        *[config.Setting(f"{name}-url", config.base_urls, url, f"base URL of the {name} service, or of its copies")
          for name, url in SERVICES.items()]]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        self.client = Client(settings.timeout)
        self.upstreams = {name: Upstream(name, getattr(settings, f"{name}_url"), keeps_keys=name in KEEPS_KEYS)
                          for name in SERVICES}

    def close(self) -> None:
        self.client.close()
        super().close()


if __name__ == "__main__":
    Gateway.main()
