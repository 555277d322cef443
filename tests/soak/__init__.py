"""Mixed load for minutes while faults strike at random, and an oracle that is held against every call.

`__main__` has the arguments, `run` the run, `report` what comes of it. `ground` is the broker or the cluster, `stage`
what plays on it: workers that serve `services`, with answers in a `store` that they share, and `callers`. `oracle` is
what calls of one key are held to, beyond what `support.load` holds all calls to. `faults` strike.

`jobs` is a soak of its own, for jobs: workers of `jobs_worker` are killed, and the oracle reads their effects.
"""
