"""The version of the whole product, as pyproject.toml says it; there need be no pyproject.toml where it runs."""

VERSION = "0.1.0"
