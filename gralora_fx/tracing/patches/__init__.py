"""What is swapped while a trace runs, and put back when it ends."""
