"""CPU kernels of the train step, in C++: built on the machine they run on, called by XLA.

On GPUs and TPUs, on several devices, and where there is no C++ compiler, the same functions are XLA
programs (`models/embedding_table.py`, `sampling/batch.py`); tests hold the two against each other.
"""
