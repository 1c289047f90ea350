"""The tour: chapters that show each pattern at work in a running shop. `python -m microshop.tour`

    __main__.py      the command: lists the chapters, and runs them
    stage.py         Tour: the verbs that a chapter is written in (say, predict, curl, kill, expect)
    own_shop.py      the shop of a chapter: run_all as a subprocess
    drawing.py       how answers, traces and rows look on 80 columns
    chapters.py      all chapters, in their order; they are in first_steps.py, failures.py,
                     sagas.py, running.py and textbook_shop.py
    index.py         each pattern with its place in the code, its test, chapter and exercise
    class_plan.py    for teachers: plans for a class, as text

A chapter is a function that reads like its own script. Everything that it shows comes from a real
shop, which is started for it and ended after it.

Law: no other part of microshop knows the tour. Every number that a chapter prints is read from the
class or constant it belongs to, and nothing waits for a fixed time.
"""
