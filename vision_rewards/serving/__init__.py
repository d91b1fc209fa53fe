"""A reward on another machine: server, client, and the format they speak."""
