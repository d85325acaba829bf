"""Spans of what took long and of what was asked for, for whoever collects traces.

``spans`` is what a span is and how the stages of one are noted; ``otlp`` sends them, if that is configured,
and is the only module that imports OpenTelemetry. Used by ``reading``, ``host``, ``api`` and ``daemon``.
Knows neither faults nor verbs.
"""
