"""microshop: the Microservices pattern in nothing but Python's standard library.

Each module here is a process, except for this one and audit.py, which is a tool; what they share is in chassis/.

                               run_all  starts, watches and ends the others
                                  :
                       +----------------------+
      client --------> |  gateway      :3000  |     owns nothing
                       +----------------------+
                          |        |       |        HTTP/1.1, kept alive (chassis.client)
               +----------+        |       +-----------+
               v                   v                   v
      +----------------+  +------------------+  +----------------+
      |  users   :3001 |  |  products  :3002 |  |  orders  :3003 |    chassis.server
      +----------------+  +------------------+  +----------------+
           users.db            products.db           orders.db        chassis.database
               ^                   ^                   |
               +-------------------+--- an order asks -+              chassis.client again

The life of GET /users/1, from the client and back:

  1. gateway    chassis.wire reads the head, strictly; chassis.server makes it a request with an id
  2.            GatewayHandler.dispatch sees the first segment, `users`, and forwards
  3.            chassis.client chooses an instance of the service, sends it on a kept-alive connection and reads the
                answer, with chassis.wire again; where there is none, it decides whether to try once more
  4. users      chassis.server finds the route; UsersHandler.get_user asks find_user, which asks the database
  5.            the row travels back as return values; chassis.answer makes bytes of it, once
  6. both       a line in the access log, with the same request id

The life of an order is the saga in orders.py; audit.py checks what came of all of them.
A handler returns its answer or raises a chassis.errors.ServiceError; it never writes.
A "Law" in a module's first docstring says what may not stand there; tests/test_laws.py holds it to that.
To read it all, begin with users.py, products.py and orders.py; then server.py, wire.py, client.py and gateway.py;
then run_all.py.
"""

GATEWAY_PORT = 3000
SERVICES = {"users": 3001, "products": 3002, "orders": 3003}  # the port of each
