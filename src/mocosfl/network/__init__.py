"""Clients on other machines: protocol, service, the cohort that the trainer sees, and the client."""
