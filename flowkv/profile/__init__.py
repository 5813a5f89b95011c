"""`flowkv profile`: what steps, transfers and messages take on this machine, for the simulator."""
