"""A picture of a rewritten graph, as SVG or as a page of HTML."""

from gralora_fx.picture.layout import PictureError
from gralora_fx.picture.page import html_of
from gralora_fx.picture.picture import svg_of
from gralora_fx.picture.saving import save

__all__ = ["PictureError", "html_of", "save", "svg_of"]
