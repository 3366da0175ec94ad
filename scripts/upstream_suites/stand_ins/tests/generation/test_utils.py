"""Stands in for a file that the source distribution leaves out: no test of generation runs."""


class GenerationTesterMixin:
    pass
