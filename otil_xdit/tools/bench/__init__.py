"""`otil-xdit bench`: how long a step takes under each strategy and under xDiT's own, taking turns in one run.

plan.py says what is compared, worker.py is what each process runs, jobs.py starts them and asks them for images in the
words of protocol.py, runner.py lets them take turns, link.py puts a slow link between them, report.py and scaling.py
write what was found.
"""
