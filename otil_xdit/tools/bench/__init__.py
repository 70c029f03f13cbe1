"""`otil-xdit bench`: how long a step takes under each strategy and under xDiT's own, taking turns in one run.

plan.py        what is compared, as frozen data, checked before anything starts
tasks.py       what each rank does when it is asked
networks.py    the pipeline of a rank
runner.py      lets the strategies take turns
link.py        a slow link between the ranks
calibrate.py   what that link really gives
results.py     what was found, and the figures of it
report.py      the table and the plot
scaling.py     plots over the number of ranks and the size of the latent

`otil_xdit.tools.common.jobs` starts the ranks and asks them.
"""
