"""One rank on fake CUDA tensors: the project's own code for GPUs, run whole on a machine that has none.

`guard` lets a CPU build of torch trace CUDA tensors, `machine` makes the process look like one of several with a card
each, `launches` counts what the code asks of the device, and `rank` makes whole steps.
"""
