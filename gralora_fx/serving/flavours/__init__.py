"""How each kind of export is opened and generates: the reading halves of `gralora_fx.exporters.flavours`."""
