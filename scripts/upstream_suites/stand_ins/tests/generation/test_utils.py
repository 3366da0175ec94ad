"""Replaces a file that the source distribution lacks. No test of generation runs."""


class GenerationTesterMixin:
    pass
