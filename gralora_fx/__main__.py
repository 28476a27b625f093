"""`python -m gralora_fx`."""

from gralora_fx.cli import main

if __name__ == "__main__":
    main()
