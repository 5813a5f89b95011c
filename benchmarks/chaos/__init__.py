"""What is done to a server under load, the load itself and its judge, and what must not be left; tests use them too."""
