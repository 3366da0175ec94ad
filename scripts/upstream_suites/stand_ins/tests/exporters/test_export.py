"""Replaces a file that the source distribution lacks. No test of exporting runs."""


class ExportTesterMixin:
    pass
