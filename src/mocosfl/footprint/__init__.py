"""What a run costs each client and the server, before it is made."""
