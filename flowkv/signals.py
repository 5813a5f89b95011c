"""The signals that processes of a cluster know. None of a supervisor's reaches more than the launcher: a whole process
group may be told to stop (by a terminal, by `timeout`, by systemd), and in which order it ends is the launcher's
business."""

import signal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # ask the launcher to stop; its children ignore them
END_SIGNAL = signal.SIGUSR2  # from the launcher: end now
DRAIN_SIGNAL = signal.SIGUSR1  # from the launcher to a frontend that is ready: end when the last request has
