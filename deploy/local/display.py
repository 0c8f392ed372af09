"""What a person sees of a command; see `client.display`."""

from client.display import Bars, Display, Lines, make_display

__all__ = ["Bars", "Display", "Lines", "make_display"]
