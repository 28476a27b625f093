"""States of recurrent layers as inputs and outputs."""
