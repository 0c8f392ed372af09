"""Grafana dashboards: described in Python, written as JSON, checked against a running stack, drawn for the README."""
