"""Whether every rank gets on: a watchdog that ends a hung job and says whom it waits for, and the ranks that are slower than their peers.

    heartbeat.py    what each rank says of itself, in run.dir/health/
    diagnosis.py    from what all say to who is to blame; pure Python
    collectives.py  which collective of which group a thread is inside
    evidence.py     stacks, flight recorder, the state of a process
    watchdog.py     the thread that puts these together
    stragglers.py   slow ranks from the time that steps take outside collectives
"""
