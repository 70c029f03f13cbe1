"""`otil-xdit plan`: bytes, memory and time of each strategy before anything is run.

networks.py      published and shipped networks without weights, and their attention layers
recorder.py      an exchange that records what it is to send
asks.py          what a network's layers ask of the communicator in a step
work.py          operations of one process's step
units.py         which block of a network asks for what
segments.py      a network in two stages: where it is cut, and what each half of the ranks does
traffic.py       bytes and messages of every step of a run, and what its buffers take
memory.py        bytes that a rank keeps for keys and values (`otil-xdit memory`)
links.py         links by name, or by rate and latency
latency.py       the time of a step: the model, its terms
options.py       strategies on compositions of the ranks
advice.py        which one to take
observations.py  what `otil-xdit bench` measured, beside what is planned
fit.py           a machine's terms from such runs, and the model against others
tables.py        a plan as tables, data, and a command line
"""
