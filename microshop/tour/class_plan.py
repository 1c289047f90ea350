"""For teachers
============

Everything runs on the learners' own machines, from a checkout of this project:
no packages, no accounts, no network. Python 3.11 or newer on Linux or macOS; on
Windows, in WSL (Ubuntu's python3 will do). Each learner needs two terminals, a
browser, and curl.

    See it      python -m microshop.tour N           one pattern at work
    Break it    python -m tests.exercise start N     a copy without one protection
    Repair it   python -m tests.exercise check N     says what is still wrong
    Watch it    the live picture of a running shop   run_all prints its address

The tour and the exercises use free ports and temporary folders, so any number
of people can work on one host. For a shop of their own, each of them needs
ports that no other uses. Learner number n, of 30:

    python -m microshop.run_all --fresh --port $((4000 + 10 * n))

Everyone on that host can send requests to all of these shops, but signals only
to their own processes. Each learner needs a checkout of their own, because
exercises are copied into it.

Ninety minutes
--------------
Prior knowledge: HTTP (methods, statuses, headers) and some Python.

   0-10   Start the shop. Show the picture in the README, the live picture, and
          one request in it. Ask: which processes has it passed through?
  10-25   Everyone: chapters 1 and 2. Ask: why may the orders service not simply
          read users.db? What does it cost that it may not?
  25-45   In front: chapters 3 and 4; let the class predict before you press
          Enter. Ask: which is worse, a service that is gone or one that hangs?
  45-55   In front: chapters 8 and 9. Ask before the kill: where is the order?
  55-80   In pairs: a five-minute exercise, then one about orders (see below).
          Let them first see the fault with the exercise's chapter.
  80-90   Chapter 15, the version that most of us write first. Ask: which of its
          faults did your last project have? What is not shown here (see below)?

Six sessions of a term
----------------------
Each: 15 minutes in front, 45 minutes of chapters and exercises, 15 minutes in
which one learner explains a diff to the others. Homework: the named file.

  1  Processes and requests    chapters 1, 2, 15     read users.py
  2  Calls that fail           chapters 3, 4         read chassis/resilience.py
  3  Time, limits, retries     chapters 5, 6, 7      read chassis/client.py
  4  Sagas                     chapters 8, 9         read orders.py
  5  Who knows what            chapters 10, 11, 12   read products.py
  6  Running it                chapters 13, 14       read chassis/supervisor.py
     Project for the last session: the exercise that adds a fourth service.

What each chapter needs
-----------------------
   1  One request, two processes                HTTP
   2  Each service owns its data                HTTP, what a database table is
   3  A service is gone                         chapter 1; processes and signals
   4  A service hangs                           chapter 3
   5  Time is passed on                         chapter 4
   6  A bulkhead keeps the rest quick           chapter 4; threads
   7  Retries only where a repeat is safe       chapter 3; idempotent methods
   8  An order is a saga                        chapter 2; what a transaction is
   9  A crash in the middle of an order         chapter 8
  10  A call without an answer                  chapter 8; chapter 4 helps
  11  The release that overtakes its reservation  chapter 8
  12  Two editors                               HTTP headers
  13  Overload and slow clients                 sockets, a little
  14  Replace everything while it runs          chapter 3
  15  The textbook version                      http.server; chapters 1 to 4

What each exercise needs
------------------------

What is not shown, and where to read about it
---------------------------------------------
  Message broker, outbox    Chris Richardson, Microservices Patterns, chapters 3
                            and 4; https://microservices.io/patterns/
  Choreographed sagas       the same, chapter 4 (the saga here is orchestrated)
  Service registry          https://microservices.io/patterns/ (here, addresses
                            are configuration)
  Containers, Kubernetes    https://kubernetes.io/docs/tutorials/
  Sign-in, TLS              RFC 6749 and RFC 8446; a proxy in front does it here
  Why distributed is hard   Martin Kleppmann, Designing Data-Intensive
                            Applications, chapters 8 and 9
"""
