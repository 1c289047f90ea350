"""For teachers
============

Everything runs on the learners' own machines, from a checkout of this project:
no packages, no accounts, no network. Python 3.11 or newer on Linux or macOS; on
Windows, in WSL (Ubuntu's python3 will do). Each learner needs two terminals, a
browser, and curl; to copy one command of chapter 13, nc as well.

    See it      python -m microshop.tour N           one pattern at work
    Break it    python -m tests.exercise start N     a copy with one fault
    Repair it   python -m tests.exercise check N     says what is still wrong
    Watch it    the live picture of a running shop   run_all prints its address

The tour and the exercises use free ports and temporary folders, so any number
of people can work on one host. For a shop of their own, each of them needs
ports that no other uses. Learner number n, of 30:

    python -m microshop.run_all --fresh --port $((4000 + 10 * n))

Everyone on that host can send requests to all of these shops, but signals only
to their own processes. Each learner needs a checkout of their own, because
exercises are copied into it.

The day before
--------------
Each learner clones the project and runs `python -m microshop.tour --all`. It
takes a minute, and ends with "15 of 15 chapters came out as they say".

Ninety minutes
--------------
Afterwards, learners can tell what happens to a request when a service is gone
or hangs, why an order is a saga, and what a key is for; and they have repaired
one fault. Prior knowledge: HTTP, some Python, what a process and a signal are.

   0-10   Start a shop (ports as above), and open its live picture. Send
          curl 'localhost:3000/orders?expand=user,product' with your port, and
          click on its trace. Ask: which processes has it passed through?
          (The gateway and three services; users and products in parallel.)
  10-25   Everyone: chapters 1 and 2. Ask: why may the orders service not read
          users.db? (Then users could not change its tables alone.) What does
          that cost? (Calls instead of a JOIN; answers that may lack a part.)
  25-45   In front: chapters 3 and 4; let the class predict before you press
          Enter. Ask: which is worse, a service that is gone or one that hangs?
          (One that hangs: its callers wait, and hang as well.)
  45-60   In front: chapter 8 to its first trace, then chapter 9. Ask before the
          kill: where is the order? (In a row of orders.db, pending.)
  60-80   In pairs: exercise 1, then 16. Let them first see the fault: they run
          the exercise's chapter in their copy. Quick pairs go on with 2.
          (Late? Leave out exercise 1.) The solution is the original, in the
          top folder; `diff` shows it beside theirs.
  80-90   Chapter 15, the version that most of us write first. Ask: which of its
          faults did your last project have? What is not shown here (see below)?
  Board   gone: tried again, then 502; hangs: 504; breaker open: 503
          pending, confirmed, rejected, cancelling, cancelled
          same key, same order

Without thinking, a chapter takes 1 to 5 seconds (chapter 13: 12); with its
questions and 60 to 130 lines to read, plan 8 to 10 minutes.

Six sessions of a term
----------------------
Each takes 90 minutes: the chapters (8 to 10 minutes each), half of them in
front; then exercises in pairs; at the end, a learner explains a diff to the
others. Homework: the exercises that are left, and the named file.

  1  Requests and data  chapters 1, 2        exercises 1, 2      users.py
  2  Calls that fail    chapters 3, 4, 15    exercises 7, 8, 10  resilience.py
  3  Time and limits    chapters 5, 6, 7     exercises 5, 6, 9   client.py
  4  Sagas              chapters 8, 9        exercises 16-18     orders.py
  5  Who knows what     chapters 10, 11, 12  exercises 3, 12-15  products.py
  6  Running it         chapters 13, 14      exercises 20-24     supervisor.py
     Projects: exercises 25 and 26; for those who are quick, 4, 11 and 19.

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
   1  Two logs, two ids                          5 min  chapter 1
   2  All or nothing                            15 min  chapter 2
   3  The lost count                            10 min  chapter 12
   4  Ten winners                               25 min  chapter 12; threads
   5  Two laptops                               10 min  chapter 7
   6  Fewer and fewer places                    10 min  chapter 6; exceptions
   7  The breaker that does not notice          15 min  chapter 4
   8  A stampede after every pause              10 min  chapter 4
   9  Work for a client that has left           15 min  chapter 5
  10  The service that never stops starting     20 min  chapter 3
  11  Three times the load, when it hurts most  15 min  chapter 7
  12  The late request                          10 min  chapter 11; SQL
  13  Rejected, and still reserved              20 min  chapters 8, 11
  14  Silence taken as a refusal                15 min  chapter 10; exceptions
  15  Reserved twice                            15 min  chapter 10; SQL
  16  The order that left no trace              15 min  chapter 9
  17  One click, two orders                     10 min  chapter 9; SQL
  18  Cancelled, but not given back             10 min  chapter 8
  19  The worker that came too late             30 min  chapter 9; SQL, threads
  20  The monitor that is too curious            5 min  chapter 13
  21  A byte now and then                       20 min  chapter 13; sockets
  22  Always room for one more                  15 min  chapter 13; sockets
  23  Cut off in the middle of a sentence       20 min  chapter 14; threads
  24  The king is dead before there is another  30 min  chapter 14; processes
  25  A fourth service: reviews                 40 min  users.py
  26  A new field: what a product costs         40 min  products.py; SQL

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
