"""One file per command: `add` makes its subparser, `run` is what it does. `quant_core.__main__` lists them."""
