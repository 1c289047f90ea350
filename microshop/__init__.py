"""microshop: the Microservices pattern in nothing but Python's standard library.

Each module in this folder runs as a process of its own, except this one (an overview), __main__.py
(short for run_all), and audit.py, backup.py and kubernetes.py (tools). What the processes share is
in chassis/; watching/ is what live is made of. To see each pattern at work, take the tour: python
-m microshop.tour (it is in tour/).

                          run_all  starts, watches and stops the others (chassis.supervisor)
                          live     :3004, shows what they do in a browser, while somebody looks
                             :
                  +----------------------+
 client --------> |  gateway      :3000  |     owns no data
                  +----------------------+
                     |        |       |        HTTP/1.1, kept alive (chassis.client)
          +----------+        |       +-----------+
          v                   v                   v
 +----------------+  +------------------+  +----------------+
 |  users   :3001 |  |  products  :3002 |  |  orders  :3003 |    chassis.server, chassis.handler
 +----------------+  +------------------+  +----------------+
      users.db            products.db           orders.db        chassis.database
          ^                   ^                   |
          +-------------------+- to place an order +             chassis.client again

The life of GET /users/1, from the client and back:

  1. gateway    chassis.listener accepts the connection; when the request comes, it gets a turn
                (chassis.turns). chassis.wire reads it, strictly; chassis.handler gives it an id
  2. gateway    GatewayHandler.dispatch looks at the first segment, `users`, and forwards
  3. gateway    chassis.client chooses an instance of the service, sends the request on a kept-alive
                connection and reads the response; if there is none, it may retry
  4. users      chassis.handler finds the route; UsersHandler.get_user calls find_user, which asks
                the database
  5. users      the row travels back as a return value; chassis.answer turns it into JSON bytes,
                which the gateway passes on unchanged
  6. both       write a line to their access log, with the same request id, and record spans of the
                same trace (chassis.telemetry); /metrics, /traces and the live picture show them

The life of an order is the saga in orders.py. A handler returns its answer or raises a
chassis.errors.ServiceError; it never writes to a socket.

To learn the pattern in thirty minutes, read users.py, gateway.py and orders.py. To read it all, go
on with products.py, then chassis/: server, listener, turns, handler, answer, wire, resilience,
client, connections, tracing, telemetry, child, supervisor. A "Law" in a module's docstring says
what must not be in the module; tests/test_laws.py checks it.
"""
import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036  # in syntax that older versions can read
    sys.stderr.write("microshop needs Python 3.11 or newer; this is " + sys.executable
                     + ", version " + sys.version.split()[0] + "\n")
    sys.stderr.flush()
    os._exit(2)  # sys.exit() would not end `python -m unittest`, which catches it

GATEWAY_PORT = 3000
SERVICES = {  # every service, and its port
    "users": 3001,
    "products": 3002,
    "orders": 3003,
}
LIVE_PORT = max(SERVICES.values()) + 1  # 3004
