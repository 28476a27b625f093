"""Pictures of a rewritten graph, as SVG or as an HTML page."""

from gralora_fx.picture.dot import PictureError
from gralora_fx.picture.page import html_of
from gralora_fx.picture.svg import save, svg_of

__all__ = ["PictureError", "html_of", "save", "svg_of"]
