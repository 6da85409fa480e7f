"""What zrpc costs, beside its peers and against the number of workers. Nothing here is a test."""
