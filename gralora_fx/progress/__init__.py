"""Progress of long work: stages and their times, a console, silence for the libraries underneath."""
