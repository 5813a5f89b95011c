"""From a socket to the application: listeners, connections, TLS, and the gate with its doors, keys and quotas."""
