"""What placement and flexible roles are worth: the same controller and engines in the simulator, load by load.

Every comparison gives each configuration the same requests, the same cost model and the same number of instances; all
runs are kept, those that FlowKV loses too. `python -m benchmarks.scheduling --help` runs it.
"""
