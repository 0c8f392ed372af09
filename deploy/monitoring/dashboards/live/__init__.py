"""A stack that runs and is asked for things, a Prometheus that reads it, and the dashboards' queries against both."""
