"""People rate pictures in a browser, blind to the system that drew them; see README.md."""
