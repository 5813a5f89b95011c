"""What `benchmarks.frontend` measures with: a client, engines that answer at once, and the gateways between them."""
