"""What exports do now and did in the last hour: rates, made of the core's counters by one thread.

Used by ``daemon``, which gives the answers to ``api``. The data path knows nothing of it.
"""
