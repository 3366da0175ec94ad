"""Stands in for a file that the source distribution leaves out: no test of exporting runs."""


class ExportTesterMixin:
    pass
