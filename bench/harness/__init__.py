"""What bench.py is made of; see bench/README.md. Python 3.9+, standard library only."""


class Skip(Exception):
    """This peer cannot take part, and why."""


class Invalid(Exception):
    """A round that does not count, and why."""
