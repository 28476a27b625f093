"""What a user sees of long work: stages and their times, a console, silence for the libraries underneath."""
