"""`otil-xdit check`: one command that says whether this package is right and fast on a user's machine.

settings.py      what is checked, as frozen data
runner.py        starts ranks, runs the parts one after the other, keeps what they find
rank.py          what every rank has: its process group, and one image
cards.py         part: the devices and the packages
links.py         part: bandwidth between the ranks
exactness.py     part: `sync` against one process
kernels.py       part: fused kernels against the eager code
repeats.py       part: the same images twice
speed.py         part: ms a step by strategy
profile.py       launches and gaps of one step
random_pipes.py  pipelines of published size with random weights
kill.py          part: a rank is killed
advice.py        part: the flags to use
report.py        the JSON and the page

A part is a function that takes a `Check` and returns a `Finding`; `cli.PARTS` lists them.
"""
