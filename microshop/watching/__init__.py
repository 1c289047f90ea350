"""What the live picture is made of: live.py asks the other processes, and draws what they tell.

    watch        asks processes for their metrics and traces, in rounds
    exposition   the metrics of a process, read from its answer
    trace_memory the traces of several processes, put together and remembered
    topology     who calls whom, how often and how well, drawn from all this

Law: only live imports this (and the tour, which shows metrics, too); the shop works without it.
"""
