"""Exercises that go with the chapters in microshop/tour/sagas.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
    Exercise(
        title="The late request",
        pattern="Tombstone",
        minutes=10,
        file="products.py",
        old='"INSERT OR REPLACE INTO reservations VALUES (?, NULL, NULL)", [reservation_id])',
        new='"DELETE FROM reservations WHERE id = ?", [reservation_id])',
        test="test_products.ReservationTest."
             "test_a_reserve_that_arrives_after_its_release_is_refused",
        story="""
            Sometimes the shop shows fewer free laptops than there are on the shelf, and no
            customer has ordered the missing ones. It happens on days when the network is slow and
            many orders are cancelled or rejected. The audit finds units that are reserved for
            orders that ended long ago.
            """,
        hints=("Two requests about one reservation can arrive in any order. Look at the pattern "
               "called tombstone, and at the products service.",
               "release() in microshop/products.py: what does reserve() see afterwards, if its "
               "request was sent before the release, but arrives after it?",
               "A row that was deleted looks like one that never existed. Keep a row with the "
               "reservation's id and without a product: reserve() refuses an id that has one."),
        chapter="tombstone"),
    Exercise(
        title="Rejected, and still reserved",
        pattern="Tombstone",
        minutes=20,
        file="orders.py",
        old="""
            if self.order["status"] == "rejected":
                self.release()
                finish_rejected(self.database, self.order_id)
""",
        new="""
            if self.order["status"] == "rejected":
                finish_rejected(self.database, self.order_id)
""",
        test="test_saga.InterleavingTest."
             "test_a_rejected_order_releases_what_another_worker_reserved_under_a_new_id",
        story="""
            The developers were sure that a rejected order holds no units. But after each outage of
            products, some units stay reserved for rejected orders. No customer can buy them, and
            since the orders are finished, nothing ever gives them back. On quiet days it never
            happens.
            """,
        hints=("Look at the saga in microshop/orders.py. Orders sent a request to reserve units, "
               "and got no answer. What may products have done?",
               "Saga.advance(): which statuses need the compensating transaction, release()? Why "
               "is finish_rejected() a step of its own?",
               "A rejected order may hold units that an earlier request has reserved. So release "
               "it, and only then record that it needs no more steps."),
        chapter="tombstone"),
    Exercise(
        title="Silence taken as a refusal",
        pattern="Eventual consistency",
        minutes=15,
        file="orders.py",
        old="except (Conflict, UnprocessableContent) as refusal:",
        new="except ServiceError as refusal:",
        test="test_saga.IndefiniteAnswerTest."
             "test_an_order_whose_reservation_gets_no_answer_stays_pending",
        story="""
            At noon, products was slow for a minute. Every customer who ordered in that minute got
            an error, 502 or 504, and the order was rejected, although there were enough laptops.
            A minute later products was fine again, but the sales of that minute are lost.
            """,
        hints=("What may a service conclude from a call that got no answer? Look at how an order "
               "is decided in microshop/orders.py.",
               "Saga.decide(): which errors mean that a service refuses, and which ones mean only "
               "that its answer is unknown? See the classes in microshop/chassis/errors.py.",
               "Only Conflict and UnprocessableContent are refusals. Let an UpstreamError pass: "
               "advance() catches it, leaves the order as it is, and puts it off."),
        chapter="no_answer"),
    Exercise(
        title="Reserved twice",
        pattern="Idempotent receiver",
        minutes=15,
        file="products.py",
        old="""
        if found == [wanted]:
            return False
""",
        new="""
        if found == [wanted]:
            raise Conflict(f"reservation {reservation_id} was already made")
""",
        test="test_products.ReservationTest.test_a_repeated_reserve_takes_the_units_once",
        story="""
            Whenever an answer from products is lost, the stock shrinks twice: an order for three
            laptops takes six. The customers get what they ordered, so they do not complain, but
            the shop soon has nothing left to sell. The audit finds reservations that belong to no
            order.
            """,
        hints=("A caller that got no answer sends the same request again. Look at the pattern "
               "called idempotent receiver, and at the products service.",
               "reserve() in microshop/products.py: what happens if the reservation exists "
               "already, with the same product and quantity? And what does Saga.reserve() in "
               "microshop/orders.py do if it gets 409 without `available`?",
               "If the row that is found is the one that is wanted, there is nothing to do, and no "
               "conflict. The docstring says what to return then."),
        chapter="no_answer"),
    Exercise(
        title="The order that left no trace",
        pattern="Durable saga log",
        minutes=15,
        file="orders.py",
        old="""
        order_id, is_new = add_order(database, self.read_fields(FIELDS), key)
""",
        new="""
        fields = self.read_fields(FIELDS)
        product = f"/products/{fields['productId']}"
        reply = self.server.client.call(self.server.products, "GET", product, self.trace())
        if reply.status == 404:
            raise UnprocessableContent({"productId": f"there is no {product}"})
        order_id, is_new = add_order(database, fields, key)
""",
        test="test_saga.InterleavingTest."
             "test_an_order_is_in_the_file_before_any_service_is_called",
        story="""
            A colleague improved something: why store an order for a product that does not exist?
            Since then orders get lost. When products is slow, or when orders crashes, customers
            say that they have ordered, but support finds no order, not even a rejected one. And
            while products is down, the shop accepts no orders at all.
            """,
        hints=("What is on disk if the orders service is killed while it waits for another "
               "service? Look at how an order is placed.",
               "create_order() in microshop/orders.py: an order exists as soon as add_order() has "
               "stored it. What is lost if the process is killed before that, or another service "
               "is down?",
               "Call no other service before add_order(). That check is not needed: if there is no "
               "such product, products refuses to reserve it, and the saga rejects the order."),
        chapter="crash"),
    Exercise(
        title="One click, two orders",
        pattern="Idempotency key",
        minutes=10,
        file="orders.py",
        old="\"VALUES (:userId, :productId, :quantity, 'pending', :key, :now,",
        new="\"VALUES (:userId, :productId, :quantity, 'pending', NULL, :now,",
        test="test_orders.IdempotencyKeyTest.test_a_repeated_key_makes_no_second_order",
        story="""
            A customer orders on the train, and the connection breaks. The app sends the request
            again, with the same Idempotency-Key, as the documentation says. Two days later two
            parcels arrive. It also happens when the orders service crashes: the gateway repeats
            the requests that were aborted, since it relies on the key.
            """,
        hints=("How does the orders service recognize a request that it has seen before? Follow "
               "the Idempotency-Key from the request to the database.",
               "add_order() in microshop/orders.py: which column makes the second INSERT do "
               "nothing, and what is stored in it?",
               "ON CONFLICT (key) works only if the key is stored: in SQL, NULL is never equal to "
               "NULL."),
        chapter="crash"),
    Exercise(
        title="Cancelled, but not given back",
        pattern="Compensating transaction",
        minutes=10,
        file="orders.py",
        old="""
                self.release()
                self.move("cancelled")
""",
        new="""
                self.move("cancelled")
                self.release()
""",
        test="test_saga.IndefiniteAnswerTest."
             "test_an_order_is_not_cancelled_before_its_units_are_released",
        story="""
            The customers are happy: they can cancel an order even while products is down, and get
            200 at once. The warehouse is not: the units of some cancelled orders stay reserved
            forever. Each of those orders was cancelled while products was down, or just before
            the orders service crashed.
            """,
        hints=("Cancelling takes two steps. What if the process ends, or a service fails, between "
               "the two?",
               "Saga.advance() in microshop/orders.py: an order that has its last status is never "
               "resumed. So what must be done before it gets that?",
               "First release(), then move(\"cancelled\")."),
        chapter="saga"),
    Exercise(
        title="The worker that came too late",
        pattern="Compare and set",
        minutes=30,
        file="orders.py",
        old='"answer = coalesce(:answer, answer) WHERE id = :id AND status = :previous",',
        new='"answer = coalesce(:answer, answer) WHERE id = :id",',
        test="test_saga.InterleavingTest."
             "test_a_worker_that_is_too_late_does_not_confirm_a_cancelled_order",
        story="""
            A customer cancels an order and gets the answer: cancelled. A second later the order is
            confirmed again, but its units are not reserved any more, and other customers buy them.
            It happens only when two workers are busy with one order: the client's request, and the
            background thread, which resumes orders that take too long.
            """,
        hints=("Two workers read the same order, and both want to change it. Look at the diagram "
               "of statuses at the top of microshop/orders.py: which arrow leads to confirmed?",
               "move_order(): what if another worker has moved the order since this one read it? "
               "What does Saga.move() expect it to return then?",
               "The UPDATE must find the row only if it still has the previous status (compare and "
               "set): AND status = :previous."),
        related="crash"),
]
