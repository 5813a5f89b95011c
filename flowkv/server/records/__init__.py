"""What is kept of requests and of the cluster, for whoever looks: timelines, journal, history, events, spans."""
