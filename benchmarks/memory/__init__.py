"""What zrpc takes of memory, processors at rest and open files."""
