"""`python -m gralora_fx.cli`."""

from gralora_fx.cli import main

if __name__ == "__main__":
    main()
