"""`python -m gralora_fx.cli`."""

from gralora_fx.cli.program import main

if __name__ == "__main__":
    main()
