"""What clients get: a generation in the shape of each route, whole or as a stream."""
