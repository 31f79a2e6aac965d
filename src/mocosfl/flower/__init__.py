"""Clients under Flower: a ServerApp, a ClientApp, and the cohorts between them. Needs the extra ``mocosfl[flower]``."""
