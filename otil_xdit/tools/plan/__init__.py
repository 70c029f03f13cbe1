"""`otil-xdit plan`: bytes, memory and time of each strategy before anything is run.

cli.py           the command line
arguments.py     what its flags say by themselves
report.py        what is printed
options.py       strategies on the degrees that the ranks allow, with bytes from `otil_xdit.dryrun`
latency.py       the time of a step: the model, its terms
advice.py        which one to take
observations.py  what `otil-xdit bench` measured, beside what is planned
fit.py           a machine's terms from such runs, and the model against others
tables.py        a plan as tables, data, and a command line
"""
