"""What a user sees of long work: stages, counts and times, reports, silence for the libraries underneath."""
